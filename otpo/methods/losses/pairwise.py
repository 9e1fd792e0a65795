"""Losses of pairs against a frozen reference.

Notation: w are token weights (the same for policy and reference), r = sum_t w_t (log pi_t - log pi_ref,t) of a
completion, delta = r_chosen - r_rejected.

Every loss takes B pairs and returns B losses, unreduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from otpo.records import LossOutput, PairLogProbs, TokenWeights


def sigmoid(pair: PairLogProbs, weights: TokenWeights, *, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """-(1 - eps) log sigma(beta delta) - eps log sigma(-beta delta).

    DPO, eq. 7 of https://arxiv.org/abs/2305.18290; with eps = `label_smoothing` > 0 conservative DPO, eq. 3 of
    https://ericmitchell.ai/cdpo.pdf. Reference code: `preference_loss` in
    https://github.com/eric-mitchell/direct-preference-optimization/blob/main/trainers.py.
    """
    chosen, rejected = log_ratios(pair, weights)
    logits = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    return LossOutput(losses, reward_metrics(pair, beta * chosen, beta * rejected))


def sigmoid_whole_reference(
    pair: PairLogProbs, weights: TokenWeights, *, beta: float, label_smoothing: float
) -> LossOutput:
    """`sigmoid` with the policy's tokens weighted and the reference's not: r = sum_t (w_t log pi_t - log pi_ref,t).

    LD-DPO as in LLaMA-Factory (`src/llamafactory/train/dpo/trainer.py`) and TRL before 0.25.
    """
    chosen, rejected = (
        (w * side.policy).sum(-1) - side.frozen_logps("reference").sum(-1)
        for w, side in ((weights.chosen, pair.chosen), (weights.rejected, pair.rejected))
    )
    logits = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    return LossOutput(losses, reward_metrics(pair, beta * chosen, beta * rejected))


def robust(pair: PairLogProbs, weights: TokenWeights, *, beta: float, label_smoothing: float) -> LossOutput:
    """[-(1 - eps) log sigma(beta delta) + eps log sigma(-beta delta)] / (1 - 2 eps).

    Robust DPO, unbiased if a fraction eps of the labels is flipped: https://arxiv.org/abs/2403.00409.
    """
    chosen, rejected = log_ratios(pair, weights)
    logits = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * logsigmoid(logits) + label_smoothing * logsigmoid(-logits)
    return LossOutput(losses / (1 - 2 * label_smoothing), reward_metrics(pair, beta * chosen, beta * rejected))


def hinge(pair: PairLogProbs, weights: TokenWeights, *, beta: float) -> LossOutput:
    """max(0, 1 - beta delta): the loss of SLiC, https://arxiv.org/abs/2305.10425, on DPO's margin (RSO, 2309.06657)."""
    chosen, rejected = log_ratios(pair, weights)
    losses = (1 - beta * (chosen - rejected)).clamp(min=0)
    return LossOutput(losses, reward_metrics(pair, beta * chosen, beta * rejected))


def ipo(pair: PairLogProbs, weights: TokenWeights, *, beta: float) -> LossOutput:
    """(delta - 1 / (2 beta))^2, eq. 17 of https://arxiv.org/abs/2310.12036; `beta` is its tau."""
    chosen, rejected = log_ratios(pair, weights)
    losses = (chosen - rejected - 1 / (2 * beta)) ** 2
    return LossOutput(losses, reward_metrics(pair, beta * chosen, beta * rejected))


def length_regularized(pair: PairLogProbs, weights: TokenWeights, *, beta: float, length_alpha: float) -> LossOutput:
    """-log sigma(beta delta + alpha (L_chosen - L_rejected)): R-DPO, https://arxiv.org/abs/2403.19159."""
    chosen, rejected = log_ratios(pair, weights)
    longer = pair.chosen.lengths - pair.rejected.lengths
    losses = -logsigmoid(beta * (chosen - rejected) + length_alpha * longer)
    return LossOutput(losses, reward_metrics(pair, beta * chosen, beta * rejected))


def squared(pair: PairLogProbs, weights: TokenWeights, *, beta: float) -> LossOutput:
    """(1 - beta delta)^2: GPO, table 1 of https://arxiv.org/abs/2402.05749."""
    return _of_margin(pair, weights, beta, lambda x: (1 - x).square())


def exponential(pair: PairLogProbs, weights: TokenWeights, *, beta: float) -> LossOutput:
    """exp(-beta delta): GPO, table 1 of https://arxiv.org/abs/2402.05749. Constant below beta delta = -80."""
    return _of_margin(pair, weights, beta, lambda x: bounded_exp(-x))


def truncated_quadratic(pair: PairLogProbs, weights: TokenWeights, *, beta: float) -> LossOutput:
    """max(0, 1 - beta delta)^2: GPO, table 1 of https://arxiv.org/abs/2402.05749."""
    return _of_margin(pair, weights, beta, lambda x: (1 - x).clamp(min=0).square())


def savage(pair: PairLogProbs, weights: TokenWeights, *, beta: float) -> LossOutput:
    """1 / (1 + exp(beta delta))^2: GPO, table 1 of https://arxiv.org/abs/2402.05749."""
    return _of_margin(pair, weights, beta, lambda x: torch.sigmoid(-x).square())


def discopop(pair: PairLogProbs, weights: TokenWeights, *, beta: float, discopop_tau: float) -> LossOutput:
    """(1 - m) (-log sigma(x)) + m exp(-x) with x = beta delta and m = sigma(x / tau).

    DiscoPOP, eq. 5 of https://arxiv.org/abs/2406.08414; as TRL's `discopop`.
    """

    def loss(x: Tensor) -> Tensor:
        # exp(-x) m in one exponent, which is bounded where exp(-x) alone is not
        return -torch.sigmoid(-x / discopop_tau) * logsigmoid(x) + (logsigmoid(x / discopop_tau) - x).exp()

    return _of_margin(pair, weights, beta, loss)


def exo(pair: PairLogProbs, weights: TokenWeights, *, beta: float, exo_epsilon: float) -> LossOutput:
    """KL of (sigma(x), sigma(-x)) from (1 - eps, eps) with x = beta delta.

    EXO on pairs, eq. 16 of https://arxiv.org/abs/2402.00856; as TRL's `exo_pair`.
    """

    def loss(x: Tensor) -> Tensor:
        wins = torch.sigmoid(x) * (logsigmoid(x) - math.log1p(-exo_epsilon))
        return wins + torch.sigmoid(-x) * (logsigmoid(-x) - math.log(exo_epsilon))

    return _of_margin(pair, weights, beta, loss)


def dpop(pair: PairLogProbs, weights: TokenWeights, *, beta: float, dpop_lambda: float) -> LossOutput:
    """-log sigma(beta (delta - lambda max(0, -r_chosen))).

    DPO-Positive (Smaug), eq. 3 of https://arxiv.org/abs/2402.13228.
    """
    chosen, rejected = log_ratios(pair, weights)
    losses = -logsigmoid(beta * (chosen - rejected - dpop_lambda * (-chosen).clamp(min=0)))
    return LossOutput(losses, reward_metrics(pair, beta * chosen, beta * rejected))


def apo_zero(pair: PairLogProbs, weights: TokenWeights, *, beta: float) -> LossOutput:
    """1 - sigma(beta r_chosen) + sigma(beta r_rejected): eq. 7 of https://arxiv.org/abs/2408.06266."""
    chosen, rejected = (beta * ratio for ratio in log_ratios(pair, weights))
    return LossOutput(torch.sigmoid(-chosen) + torch.sigmoid(rejected), reward_metrics(pair, chosen, rejected))


def apo_down(pair: PairLogProbs, weights: TokenWeights, *, beta: float) -> LossOutput:
    """sigma(beta r_chosen) + 1 - sigma(beta delta): eq. 8 of https://arxiv.org/abs/2408.06266."""
    chosen, rejected = (beta * ratio for ratio in log_ratios(pair, weights))
    losses = torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
    return LossOutput(losses, reward_metrics(pair, chosen, rejected))


def nca(pair: PairLogProbs, weights: TokenWeights, *, beta: float) -> LossOutput:
    """-log sigma(beta r_chosen) - (log sigma(-beta r_chosen) + log sigma(-beta r_rejected)) / 2.

    NCA on pairs, https://arxiv.org/abs/2402.05369; as TRL's `nca_pair`.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(pair, weights))
    losses = -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
    return LossOutput(losses, reward_metrics(pair, chosen, rejected))


def bco_pair(pair: PairLogProbs, weights: TokenWeights, *, beta: float) -> LossOutput:
    """-log sigma(beta r_chosen) - log sigma(-beta r_rejected): BCO, https://arxiv.org/abs/2404.04656."""
    chosen, rejected = (beta * ratio for ratio in log_ratios(pair, weights))
    return LossOutput(-logsigmoid(chosen) - logsigmoid(-rejected), reward_metrics(pair, chosen, rejected))


def sppo_hard(pair: PairLogProbs, weights: TokenWeights, *, beta: float) -> LossOutput:
    """(r_chosen - 1 / (2 beta))^2 + (r_rejected + 1 / (2 beta))^2.

    SPPO with hard labels, eq. 4.7 of https://arxiv.org/abs/2405.00675; as TRL's `sppo_hard`.
    """
    chosen, rejected = log_ratios(pair, weights)
    losses = (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()
    return LossOutput(losses, reward_metrics(pair, beta * chosen, beta * rejected))


def wpo(pair: PairLogProbs, weights: TokenWeights, *, beta: float, label_smoothing: float) -> LossOutput:
    """`sigmoid` times the product over both completions of exp(mean_t (log pi_t - log sum_v pi_v^2)).

    WPO, eq. 2 and the sampled alignment of https://arxiv.org/abs/2406.11827: the factor says how likely the policy is
    to generate both completions, has no gradient, and is logged as `wpo_weight`. As TRL's `use_weighting`.
    """
    alignment = [
        ((side.policy.detach() - side.vocabulary["log_sum_squares"]) * side.mask).sum(-1) / side.lengths.clamp(min=1)
        for side in (pair.chosen, pair.rejected)
    ]
    weight = bounded_exp(alignment[0] + alignment[1])
    output = sigmoid(pair, weights, beta=beta, label_smoothing=label_smoothing)
    return LossOutput(output.losses * weight, output.metrics | {"wpo_weight": weight})


def tdpo1(pair: PairLogProbs, weights: TokenWeights, *, beta: float) -> LossOutput:
    """-log sigma(beta (delta - (D_rejected - D_chosen))), D = sum_t w_t KL(pi_ref | pi) over the vocabulary.

    TDPO1, https://arxiv.org/abs/2404.11999. Reference code: `tdpo_loss` in
    https://github.com/Vance0124/Token-level-Direct-Preference-Optimization/blob/master/trainers.py, which logs
    beta (r + D) as rewards; here `rewards/*` are beta r as for every loss, and D is logged as `kl/*`.
    """
    chosen, rejected = log_ratios(pair, weights)
    kl_chosen, kl_rejected = _divergences(pair, weights)
    losses = -logsigmoid(beta * (chosen - rejected - (kl_rejected - kl_chosen)))
    metrics = {"kl/chosen": kl_chosen.detach(), "kl/rejected": kl_rejected.detach()}
    return LossOutput(losses, reward_metrics(pair, beta * chosen, beta * rejected) | metrics)


def tdpo2(pair: PairLogProbs, weights: TokenWeights, *, beta: float, tdpo_alpha: float) -> LossOutput:
    """-log sigma(beta (delta - alpha (D_rejected - D_chosen))), no gradient through D_chosen: TDPO2. See `tdpo1`."""
    chosen, rejected = log_ratios(pair, weights)
    kl_chosen, kl_rejected = _divergences(pair, weights)
    losses = -logsigmoid(beta * (chosen - rejected - tdpo_alpha * (kl_rejected - kl_chosen.detach())))
    metrics = {"kl/chosen": kl_chosen.detach(), "kl/rejected": kl_rejected.detach()}
    return LossOutput(losses, reward_metrics(pair, beta * chosen, beta * rejected) | metrics)


def f_divergence(
    pair: PairLogProbs,
    weights: TokenWeights,
    *,
    beta: float,
    label_smoothing: float,
    divergence: str,
    divergence_alpha: float,
) -> LossOutput:
    """-log sigma(beta (f'(e^r_chosen) - f'(e^r_rejected))), smoothed as `sigmoid` is.

    f-DPO, table 1 of https://arxiv.org/abs/2309.16240, without the additive constants of f', which cancel.
    As in TRL, `rewards/*` are beta r whatever the divergence.

    Args:
        pair, weights, beta, label_smoothing: as in `sigmoid`.
        divergence: "reverse_kl": f' = r; "forward_kl": -exp(-r); "js": log sigma(r); "alpha": exp((a - 1) r) / (a - 1).
        divergence_alpha: the a of "alpha"; 1 is "reverse_kl". Exponents are bounded by 80.
    """
    order = divergence_alpha - 1

    def slope(ratio: Tensor) -> Tensor:
        if divergence == "forward_kl":
            return -bounded_exp(-ratio)
        if divergence == "js":
            return logsigmoid(ratio)
        if divergence == "alpha" and abs(order) > 1e-6:
            return bounded_exp(order * ratio) / order
        return ratio

    chosen, rejected = log_ratios(pair, weights)
    logits = beta * (slope(chosen) - slope(rejected))
    losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    return LossOutput(losses, reward_metrics(pair, beta * chosen, beta * rejected))


def log_ratios(pair: PairLogProbs, weights: TokenWeights) -> tuple[Tensor, Tensor]:
    """(B,) r of the chosen and of the rejected completions."""
    chosen = (weights.chosen * (pair.chosen.policy - pair.chosen.frozen_logps("reference"))).sum(-1)
    rejected = (weights.rejected * (pair.rejected.policy - pair.rejected.frozen_logps("reference"))).sum(-1)
    return chosen, rejected


def _divergences(pair: PairLogProbs, weights: TokenWeights) -> tuple[Tensor, Tensor]:
    """(B,) D of the chosen and of the rejected completions."""
    chosen = (weights.chosen * pair.chosen.vocabulary["reference_kl"]).sum(-1)
    return chosen, (weights.rejected * pair.rejected.vocabulary["reference_kl"]).sum(-1)


def reward_metrics(pair: PairLogProbs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """(B,) metrics under TRL's names.

    `rewards/*` are of the weighted sums, as the loss. `logps/*` are the policy's unweighted sums, which can be compared
    across methods.
    """
    chosen, rejected = chosen.detach(), rejected.detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "logps/chosen": pair.chosen.policy.detach().sum(-1),
        "logps/rejected": pair.rejected.policy.detach().sum(-1),
    }


def bounded_exp(exponent: Tensor) -> Tensor:
    """exp(min(exponent, 80)), which float32 can hold."""
    return exponent.clamp(max=80).exp()


def _of_margin(pair: PairLogProbs, weights: TokenWeights, beta: float, loss: Callable[[Tensor], Tensor]) -> LossOutput:
    """A loss that is a function of beta delta alone."""
    chosen, rejected = (beta * ratio for ratio in log_ratios(pair, weights))
    return LossOutput(loss(chosen - rejected), reward_metrics(pair, chosen, rejected))
