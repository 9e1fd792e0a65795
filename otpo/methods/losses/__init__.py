"""Losses: pure functions of per-token log-probabilities and token weights.

`pairwise` holds the losses against a reference, `reference_free` those without, `coupled` those that compare the pairs
of the global batch, `unpaired` those of single labelled completions (KTO), `reward` those of a reward model's scores. A
new loss is a function there and a line here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from otpo.methods.losses import coupled, pairwise, reference_free, reward, unpaired
from otpo.methods.spec import MethodSpec
from otpo.records import LogProbs, LossOutput, PairLogProbs, TokenWeights

LOSSES: dict[str, Callable[..., LossOutput]] = {
    "sigmoid": pairwise.sigmoid,
    "sigmoid_whole_reference": pairwise.sigmoid_whole_reference,
    "robust": pairwise.robust,
    "hinge": pairwise.hinge,
    "ipo": pairwise.ipo,
    "squared": pairwise.squared,
    "exponential": pairwise.exponential,
    "truncated_quadratic": pairwise.truncated_quadratic,
    "savage": pairwise.savage,
    "discopop": pairwise.discopop,
    "exo": pairwise.exo,
    "length_regularized": pairwise.length_regularized,
    "dpop": pairwise.dpop,
    "apo_zero": pairwise.apo_zero,
    "apo_down": pairwise.apo_down,
    "nca": pairwise.nca,
    "bco_pair": pairwise.bco_pair,
    "sppo_hard": pairwise.sppo_hard,
    "wpo": pairwise.wpo,
    "tdpo1": pairwise.tdpo1,
    "tdpo2": pairwise.tdpo2,
    "f_divergence": pairwise.f_divergence,
    "aot": coupled.aot,
    "aot_unpaired": coupled.aot_unpaired,
    "simpo": reference_free.simpo,
    "simpo_selected": reference_free.simpo_selected,
    "alphapo": reference_free.alphapo,
    "cpo": reference_free.cpo,
    "orpo": reference_free.orpo,
    "kto": unpaired.kto,
    "bradley_terry": reward.bradley_terry,
}


COLLECTED: dict[str, Callable[[PairLogProbs, TokenWeights], Tensor]] = {
    "aot": coupled.aot_values,
    "aot_unpaired": coupled.aot_unpaired_values,
}
"""Losses that need to know a few values of every pair of the global batch, and what gives these."""


def pair_loss(
    spec: MethodSpec, pair: PairLogProbs, weights: TokenWeights, global_values: Tensor | None = None
) -> LossOutput:
    """The losses of `spec` with its hyperparameters; the weights' metrics stand beside the loss's own.

    For a loss in `COLLECTED`, `global_values` holds the values of all pairs of the global batch; without it, these are
    the whole batch.

    With `sft_weight` above 0, that times the chosen answer's mean negative log-likelihood is added (RPO,
    https://arxiv.org/abs/2404.19733) and logged as `nll_loss`. TRL's `sft` takes the mean over the tokens of the
    micro-batch instead, which depends on how pairs are batched.
    """
    loss = LOSSES[spec.method.loss]
    of_all = {"global_values": global_values} if spec.method.loss in COLLECTED else {}
    output = loss(pair, weights, **spec.arguments(loss), **of_all)
    losses, metrics = output.losses, output.metrics | weights.metrics
    if sft_weight := float(spec.hyperparameters["sft_weight"]):
        likelihood = reference_free.chosen_nll(pair)
        losses, metrics = losses + sft_weight * likelihood, metrics | {"nll_loss": likelihood.detach()}
    return LossOutput(losses, metrics)


def completion_loss(spec: MethodSpec, answers: LogProbs, labels: Tensor, global_values: Tensor) -> LossOutput:
    """The losses of a method of labelled completions. With `sft_weight`, desirable ones add their mean negative
    log-likelihood.

    Args:
        answers: B completions. labels: (B,) bool, True for desirable ones.
        global_values: values of the global batch, see the loss.
    """
    loss = LOSSES[spec.method.loss]
    output = loss(answers, labels, global_values, **spec.arguments(loss))
    losses, metrics = output.losses, output.metrics
    if sft_weight := float(spec.hyperparameters["sft_weight"]):
        likelihood = torch.where(labels, -answers.policy.sum(-1) / answers.lengths.clamp(min=1), 0.0)
        losses = losses + sft_weight * likelihood
        found = unpaired.by_label("nll_loss", likelihood.detach(), labels, global_values[:, 1])
        if "nll_loss/chosen" in found:
            metrics = metrics | {"nll_loss": found["nll_loss/chosen"]}
    return LossOutput(losses, metrics)
