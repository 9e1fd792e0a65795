"""Applies a method's loss to pairs or to labelled completions."""

from __future__ import annotations

import torch
from torch import Tensor

from otpo.methods.losses.reference_free import chosen_nll
from otpo.methods.losses.unpaired import by_label
from otpo.methods.spec import MethodSpec
from otpo.records import LogProbs, LossOutput, PairLogProbs, TokenWeights


def pair_loss(
    spec: MethodSpec, pair: PairLogProbs, weights: TokenWeights, global_values: Tensor | None = None
) -> LossOutput:
    """The losses of a method of pairs, with the loss's metrics and the weights'.

    With `sft_weight` above 0, that times the chosen completion's mean negative log-likelihood is added (RPO,
    https://arxiv.org/abs/2404.19733) and logged as `nll_loss`. TRL's `sft` takes the mean over the tokens of the
    micro-batch instead, which depends on how pairs are batched.

    Args:
        spec: the method.
        pair: B pairs, with what the loss needs.
        weights: their token weights.
        global_values: (n, 2), for a loss that `collects`: its values of all n pairs of the global batch. None takes
            the B pairs as the global batch.
    """
    loss = spec.method.loss
    of_all = {"global_values": global_values} if loss.collects else {}
    output = loss.function(pair, weights, **spec.arguments(loss.function), **of_all)
    losses, metrics = output.losses, output.metrics | weights.metrics
    if sft_weight := float(spec.hyperparameters["sft_weight"]):
        likelihood = chosen_nll(pair)
        losses, metrics = losses + sft_weight * likelihood, metrics | {"nll_loss": likelihood.detach()}
    return LossOutput(losses, metrics)


def completion_loss(spec: MethodSpec, completions: LogProbs, labels: Tensor, global_values: Tensor) -> LossOutput:
    """The losses of a method of labelled completions.

    With `sft_weight` above 0, that times a desirable completion's mean negative log-likelihood is added.

    Args:
        spec: the method.
        completions: B completions, with what the loss needs.
        labels: (B,) bool, True for desirable ones.
        global_values: the values that the loss collects, of all completions of the global batch; `kto` says which.
    """
    loss = spec.method.loss.function
    output = loss(completions, labels, global_values, **spec.arguments(loss))
    losses, metrics = output.losses, output.metrics
    if sft_weight := float(spec.hyperparameters["sft_weight"]):
        likelihood = torch.where(labels, -completions.policy.sum(-1) / completions.lengths.clamp(min=1), 0.0)
        losses = losses + sft_weight * likelihood
        found = by_label("nll_loss", likelihood.detach(), labels, global_values[:, 1])
        if "nll_loss/chosen" in found:
            metrics = metrics | {"nll_loss": found["nll_loss/chosen"]}
    return LossOutput(losses, metrics)
