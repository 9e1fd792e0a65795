"""Pairwise losses against a frozen reference.

Notation: w token weights (policy and reference are weighted alike), r = sum_t w_t (log pi_t - log pi_ref,t) of an
answer, delta = r_chosen - r_rejected. Every loss takes B pairs and returns B losses, unreduced.
"""

from __future__ import annotations

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


def robust(pair: PairLogProbs, weights: TokenWeights, *, beta: float, label_smoothing: float) -> LossOutput:
    """[-(1 - eps) log sigma(beta delta) + eps log sigma(-beta delta)] / (1 - 2 eps).

    Robust DPO, unbiased if a share eps of the labels is flipped: https://arxiv.org/abs/2403.00409.
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


def log_ratios(pair: PairLogProbs, weights: TokenWeights) -> tuple[Tensor, Tensor]:
    """(B,) r of the chosen and of the rejected answers."""
    chosen = (weights.chosen * (pair.chosen.policy - pair.chosen.scorer("reference"))).sum(-1)
    rejected = (weights.rejected * (pair.rejected.policy - pair.rejected.scorer("reference"))).sum(-1)
    return chosen, rejected


def reward_metrics(pair: PairLogProbs, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """(B,) metrics under TRL's names. `rewards/*` are weighted as the loss is; `logps/*` are the plain sums of the
    policy's log-probabilities, which compare across methods.
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
