"""Losses of pairs without a reference.

Notation: s = sum_t w_t log pi_t of a completion with token weights w.

Every loss takes B pairs and returns B losses, unreduced. `rewards/*` are beta s, as in TRL.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from otpo.methods.losses.pairwise import bounded_exp, reward_metrics
from otpo.records import LossOutput, PairLogProbs, TokenWeights


def simpo(
    pair: PairLogProbs, weights: TokenWeights, *, beta: float, gamma_beta_ratio: float, label_smoothing: float
) -> LossOutput:
    """-log sigma(beta (s_chosen - s_rejected - gamma / beta)), smoothed as `sigmoid` is.

    With mean weights SimPO, https://arxiv.org/abs/2405.14734. Reference code: `simpo_loss` in https://github.com/princeton-nlp/SimPO/blob/main/scripts/simpo_trainer.py.
    """
    chosen, rejected = log_likelihoods(pair, weights)
    logits = beta * (chosen - rejected - gamma_beta_ratio)
    losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    return LossOutput(losses, reward_metrics(pair, beta * chosen, beta * rejected))


def cpo(
    pair: PairLogProbs, weights: TokenWeights, *, beta: float, cpo_alpha: float, label_smoothing: float
) -> LossOutput:
    """-log sigma(beta (s_chosen - s_rejected)) - alpha mean_t log pi_chosen,t.

    CPO, https://arxiv.org/abs/2401.08417. The likelihood term is the mean over each chosen completion's tokens. The
    reference code takes the mean over the micro-batch's tokens, which depends on how pairs are batched.
    """
    chosen, rejected = log_likelihoods(pair, weights)
    logits = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    return LossOutput(losses + cpo_alpha * chosen_nll(pair), reward_metrics(pair, beta * chosen, beta * rejected))


def simpo_selected(
    pair: PairLogProbs, weights: TokenWeights, *, beta: float, gamma_beta_ratio: float, label_smoothing: float
) -> LossOutput:
    """`simpo`, but 0 for a pair with a side of which no token was selected (all its weights are 0).

    ConfPO, https://arxiv.org/abs/2506.08712. Reference code: `cpo_loss_confpo` in
    https://github.com/hee-suk-yoon/ConfPO/blob/main/trl-main/trl/trainer/cpo_trainer.py.
    """
    output = simpo(pair, weights, beta=beta, gamma_beta_ratio=gamma_beta_ratio, label_smoothing=label_smoothing)
    selected = (weights.chosen != 0).any(-1) & (weights.rejected != 0).any(-1)
    return LossOutput(torch.where(selected, output.losses, 0.0), output.metrics)


def alphapo(
    pair: PairLogProbs,
    weights: TokenWeights,
    *,
    beta: float,
    gamma_beta_ratio: float,
    label_smoothing: float,
    alphapo_alpha: float,
) -> LossOutput:
    """`simpo` on (1 - exp(-alpha s)) / alpha, which tends to s as alpha tends to 0.

    AlphaPO, https://arxiv.org/abs/2501.03884; as TRL's CPO trainer. `rewards/*` are beta times the shaped s. Exponents
    are bounded by 80.
    """
    chosen, rejected = log_likelihoods(pair, weights)
    if alphapo_alpha:
        chosen, rejected = ((1 - bounded_exp(-alphapo_alpha * s)) / alphapo_alpha for s in (chosen, rejected))
    logits = beta * (chosen - rejected - gamma_beta_ratio)
    losses = -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)
    return LossOutput(losses, reward_metrics(pair, beta * chosen, beta * rejected))


def orpo(pair: PairLogProbs, weights: TokenWeights, *, orpo_lambda: float) -> LossOutput:
    """-mean_t log pi_chosen,t - lambda log sigma(log odds_chosen - log odds_rejected), odds = p / (1 - p), p = e^s.

    ORPO, eq. 6 and 7 of https://arxiv.org/abs/2403.07691. The likelihood is that of the chosen completion, as in
    LLaMA-Factory; the official code (https://github.com/xfactlab/orpo, src/orpo_trainer.py) and TRL count the prompt's
    tokens too. `rewards/*` are lambda s, as in TRL.
    """
    chosen, rejected = log_likelihoods(pair, weights)
    losses = chosen_nll(pair) - orpo_lambda * logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    return LossOutput(losses, reward_metrics(pair, orpo_lambda * chosen, orpo_lambda * rejected))


def _log_odds(log_probability: Tensor) -> Tensor:
    """log(p / (1 - p)). p is bounded below 1, which a completion without tokens would have."""
    log_probability = log_probability.clamp(max=-1e-6)
    return log_probability - (-torch.expm1(log_probability)).log()


def log_likelihoods(pair: PairLogProbs, weights: TokenWeights) -> tuple[Tensor, Tensor]:
    """(B,) s of the chosen and of the rejected completions."""
    return (weights.chosen * pair.chosen.policy).sum(-1), (weights.rejected * pair.rejected.policy).sum(-1)


def chosen_nll(pair: PairLogProbs) -> Tensor:
    """(B,) negative log-likelihood of each chosen completion, averaged over its tokens."""
    return -pair.chosen.policy.sum(-1) / pair.chosen.lengths.clamp(min=1)
