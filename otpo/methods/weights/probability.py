"""Token-weight rules that read how probable each token is under the policy or under frozen models.

Shape legend: B pairs, T padded length of a completion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from otpo.records import LogProbs, PairLogProbs, TokenWeights


def confpo(pair: PairLogProbs, *, seed: int = 0) -> TokenWeights:
    """Equal weights that sum to 1, on the tokens less probable than their completion's (arithmetic) mean probability.

    ConfPO (ICML 2025, https://arxiv.org/abs/2506.08712), under the current policy. Where all tokens of a completion are
    equally probable, as in a completion of one token, none is selected and all weights are 0.
    """

    def weights(side: LogProbs) -> Tensor:
        probability = side.policy.detach().exp() * side.mask
        average = probability.sum(-1) / side.lengths.clamp(min=1)
        selected = (probability < average[:, None]) & side.mask
        return selected.to(probability) / selected.sum(-1, keepdim=True).clamp(min=1)

    return TokenWeights(weights(pair.chosen), weights(pair.rejected))


def sepo(pair: PairLogProbs, *, seed: int = 0, keep_ratio: float) -> TokenWeights:
    """Equal weights that sum to 1, on the tokens that the oracle prefers most (chosen) or least (rejected).

    SePO, https://arxiv.org/abs/2408.13518: a token's score is log pi_oracle - log pi_reference. Of L tokens
    max(1, floor(keep_ratio L)) are kept; the official code (https://github.com/SteveKGYang/SePO) counts L - 1 and
    cannot select the first.
    """

    def weights(side: LogProbs, sign: int) -> Tensor:
        scores = sign * (side.frozen_logps("oracle") - side.frozen_logps("reference"))
        selected = _best(scores, side, keep_ratio)
        return selected.to(scores) / selected.sum(-1, keepdim=True).clamp(min=1)

    return TokenWeights(weights(pair.chosen, 1), weights(pair.rejected, -1))


def tgdpo(pair: PairLogProbs, *, seed: int = 0, beta: float, tgdpo_alpha: float) -> TokenWeights:
    """1 + alpha beta r on chosen and 1 - alpha beta r on rejected tokens, r = log pi_oracle - log pi_reference.

    TGDPO, https://arxiv.org/abs/2506.14574. Weights may be negative. Reference code: `src/llamafactory/train/tgdpo` of
    https://github.com/dvlab-research/TGDPO.
    """

    def weights(side: LogProbs, sign: int) -> Tensor:
        rewards = side.frozen_logps("oracle") - side.frozen_logps("reference")
        return (1 + sign * tgdpo_alpha * beta * rewards) * side.mask

    return TokenWeights(weights(pair.chosen, 1), weights(pair.rejected, -1))


def tis(pair: PairLogProbs, *, seed: int = 0, transform: str, keep_ratio: float) -> TokenWeights:
    """Weights from the scores s = log pi_positive - log pi_negative on chosen and -s on rejected tokens.

    TIS-DPO, https://arxiv.org/abs/2410.04350. Reference code: `token_weight_estimation.py` of
    https://github.com/exlaw/TIS-DPO, which gives the last token weight 0 and rounds scores to two decimals.

    Args:
        pair: B pairs with the log-probabilities of "positive" and "negative".
        seed: not used.
        transform: "rank_based": the rank within the completion, mapped to [0.7, 1.3]; "threshold_and_scale": s clipped
            to [-1.5, 1.5], mapped to the same; "binary": 1 on the best-scored tokens, else 0.
        keep_ratio: with "binary", the fraction of the tokens that have weight 1.
    """

    def weights(side: LogProbs, sign: int) -> Tensor:
        scores = sign * (side.frozen_logps("positive") - side.frozen_logps("negative"))
        if transform == "threshold_and_scale":
            scaled = 1 + 0.2 * scores.clamp(-1.5, 1.5)
        elif transform == "binary":
            scaled = _best(scores, side, keep_ratio)
        else:
            last = (side.lengths - 1)[:, None]
            position = torch.where(last > 0, _rank(scores, side.mask) / last.clamp(min=1), 0.5)
            scaled = 0.7 + 0.6 * position
        return (scaled * side.mask).to(scores)

    return TokenWeights(weights(pair.chosen, 1), weights(pair.rejected, -1))


def _rank(scores: Tensor, mask: Tensor) -> Tensor:
    """(B, T) rank of each token among its completion's scores, 0 for the lowest; padding comes last."""
    return scores.masked_fill(~mask, torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1)


def _best(scores: Tensor, side: LogProbs, fraction: float) -> Tensor:
    """(B, T) True on the best-scored tokens: max(1, floor(fraction length)) of each completion."""
    # the small addition keeps 0.3 * 10 from falling below 3
    number = (side.lengths * fraction + 1e-6).floor().long().clamp(min=1)
    return (_rank(scores, side.mask) >= (side.lengths - number)[:, None]) & side.mask
