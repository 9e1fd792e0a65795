"""Pairwise losses without a reference.

Notation: s = sum_t w_t log pi_t of an answer. Every loss takes B pairs and returns B losses, unreduced. `rewards/*` are
beta s, as in TRL.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from otpo.losses.pairwise import reward_metrics
from otpo.records import LossOutput, PairLogProbs, TokenWeights


def simpo(
    pair: PairLogProbs, weights: TokenWeights, *, beta: float, gamma_beta_ratio: float, label_smoothing: float
) -> LossOutput:
    """-log sigma(beta (s_chosen - s_rejected - gamma / beta)), with mean weights https://arxiv.org/abs/2405.14734.

    Reference code: `simpo_loss` in https://github.com/princeton-nlp/SimPO/blob/main/scripts/simpo_trainer.py.
    """
    chosen, rejected = log_likelihoods(pair, weights)
    logits = beta * (chosen - rejected - gamma_beta_ratio)
    losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    return LossOutput(losses, reward_metrics(pair, beta * chosen, beta * rejected))


def cpo(
    pair: PairLogProbs, weights: TokenWeights, *, beta: float, cpo_alpha: float, label_smoothing: float
) -> LossOutput:
    """-log sigma(beta (s_chosen - s_rejected)) - alpha mean_t log pi_chosen,t.

    CPO, https://arxiv.org/abs/2401.08417. The likelihood term is the mean over each chosen answer's tokens; the
    reference code takes the mean over the micro-batch's tokens, which depends on how pairs are batched.
    """
    chosen, rejected = log_likelihoods(pair, weights)
    logits = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    likelihood = pair.chosen.policy.sum(-1) / pair.chosen.lengths.clamp(min=1)
    return LossOutput(losses - cpo_alpha * likelihood, reward_metrics(pair, beta * chosen, beta * rejected))


def log_likelihoods(pair: PairLogProbs, weights: TokenWeights) -> tuple[Tensor, Tensor]:
    """(B,) s of the chosen and of the rejected answers."""
    return (weights.chosen * pair.chosen.policy).sum(-1), (weights.rejected * pair.rejected.policy).sum(-1)
