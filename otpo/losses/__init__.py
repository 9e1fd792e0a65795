"""Losses: pure functions of per-token log-probabilities and token weights.

`pairwise` holds the losses against a reference, `reference_free` those without; losses of single labelled completions
(KTO) belong in `unpaired`. A new loss is a function there and a line here.
"""

from __future__ import annotations

from collections.abc import Callable

from otpo.losses import pairwise, reference_free
from otpo.methods import MethodSpec
from otpo.records import LossOutput, PairLogProbs, TokenWeights

LOSSES: dict[str, Callable[..., LossOutput]] = {
    "sigmoid": pairwise.sigmoid,
    "robust": pairwise.robust,
    "hinge": pairwise.hinge,
    "ipo": pairwise.ipo,
    "length_regularized": pairwise.length_regularized,
    "simpo": reference_free.simpo,
    "cpo": reference_free.cpo,
}


def pair_loss(spec: MethodSpec, pair: PairLogProbs, weights: TokenWeights) -> LossOutput:
    """The losses of `spec` with its hyperparameters; the weights' metrics stand beside the loss's own."""
    loss = LOSSES[spec.method.loss]
    output = loss(pair, weights, **spec.arguments(loss))
    return LossOutput(output.losses, output.metrics | weights.metrics)
