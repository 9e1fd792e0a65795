"""Token-weight rules that read how probable models find each token: the policy, or frozen scorers.

Shape legend: B pairs, T padded length of a completion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from otpo.records import LogProbs, PairLogProbs, TokenWeights


def confpo(pair: PairLogProbs, *, seed: int = 0) -> TokenWeights:
    """Even weights, summing to 1, on the tokens less probable than their answer's (arithmetic) mean probability.

    ConfPO (ICML 2025, https://arxiv.org/abs/2506.08712), under the current policy. Where all of an answer's tokens are
    equally probable, as with a single one, none is selected and all weights are 0.
    """

    def side(answer: LogProbs) -> Tensor:
        probability = answer.policy.detach().exp() * answer.mask
        average = probability.sum(-1) / answer.lengths.clamp(min=1)
        selected = (probability < average[:, None]) & answer.mask
        return selected.to(probability) / selected.sum(-1, keepdim=True).clamp(min=1)

    return TokenWeights(side(pair.chosen), side(pair.rejected))


def sepo(pair: PairLogProbs, *, seed: int = 0, keep_ratio: float) -> TokenWeights:
    """Even weights, summing to 1, on the share of the tokens that the oracle prefers most (chosen) or least (rejected).

    SePO, https://arxiv.org/abs/2408.13518: a token's score is log pi_oracle - log pi_reference. Of L tokens
    max(1, floor(keep_ratio L)) are kept; the official code (https://github.com/SteveKGYang/SePO) counts L - 1 and
    cannot select the first.
    """

    def side(answer: LogProbs, sign: int) -> Tensor:
        scores = sign * (answer.frozen_logps("oracle") - answer.frozen_logps("reference"))
        selected = _rank(scores, answer.mask) >= (answer.lengths - _share(answer, keep_ratio))[:, None]
        selected = selected & answer.mask
        return selected.to(scores) / selected.sum(-1, keepdim=True).clamp(min=1)

    return TokenWeights(side(pair.chosen, 1), side(pair.rejected, -1))


def tgdpo(pair: PairLogProbs, *, seed: int = 0, beta: float, tgdpo_alpha: float) -> TokenWeights:
    """1 + alpha beta r on the chosen and 1 - alpha beta r on the rejected answer, r = log pi_oracle - log pi_reference.

    TGDPO, https://arxiv.org/abs/2506.14574. Weights may be negative. Reference code: `src/llamafactory/train/tgdpo` of
    https://github.com/dvlab-research/TGDPO.
    """

    def side(answer: LogProbs, sign: int) -> Tensor:
        rewards = answer.frozen_logps("oracle") - answer.frozen_logps("reference")
        return (1 + sign * tgdpo_alpha * beta * rewards) * answer.mask

    return TokenWeights(side(pair.chosen, 1), side(pair.rejected, -1))


def tis(pair: PairLogProbs, *, seed: int = 0, transform: str, keep_ratio: float) -> TokenWeights:
    """Weights from s = log pi_positive - log pi_negative on the chosen and from -s on the rejected answer.

    TIS-DPO, https://arxiv.org/abs/2410.04350. Reference code: `token_weight_estimation.py` of
    https://github.com/exlaw/TIS-DPO, which gives the last token weight 0 and rounds scores to two decimals.

    Args:
        pair: B pairs with the scorers "positive" and "negative".
        seed: not used.
        transform: "rank_based": the rank within the answer, mapped to [0.7, 1.3]; "threshold_and_scale": s clipped to
            [-1.5, 1.5], mapped to the same; "binary": 1 on the best-scored share of the tokens, else 0.
        keep_ratio: that share.
    """

    def side(answer: LogProbs, sign: int) -> Tensor:
        scores = sign * (answer.frozen_logps("positive") - answer.frozen_logps("negative"))
        if transform == "threshold_and_scale":
            weights = 1 + 0.2 * scores.clamp(-1.5, 1.5)
        elif transform == "binary":
            weights = _rank(scores, answer.mask) >= (answer.lengths - _share(answer, keep_ratio))[:, None]
        else:
            last = (answer.lengths - 1)[:, None]
            position = torch.where(last > 0, _rank(scores, answer.mask) / last.clamp(min=1), 0.5)
            weights = 0.7 + 0.6 * position
        return (weights * answer.mask).to(scores)

    return TokenWeights(side(pair.chosen, 1), side(pair.rejected, -1))


def _rank(scores: Tensor, mask: Tensor) -> Tensor:
    """(B, T) place of each token among its answer's scores, 0 the lowest; padding comes last."""
    return scores.masked_fill(~mask, torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1)


def _share(answer: LogProbs, ratio: float) -> Tensor:
    """(B,) how many tokens a share of an answer is, at least one."""
    # the small addition keeps 0.3 * 10 from falling below 3
    return (answer.lengths * ratio + 1e-6).floor().long().clamp(min=1)
