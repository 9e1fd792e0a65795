"""Applies a method's weight rule to pairs, and measures the weights.

Shape legend: B pairs, T padded length of a completion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from otpo.methods.spec import MethodSpec
from otpo.records import PairLogProbs, SequenceBatch, TokenWeights


def token_weights(spec: MethodSpec, pair: PairLogProbs, *, seed: int = 0) -> TokenWeights:
    """The token weights of a method, with the metrics that describe them.

    Args:
        spec: the method, whose weight rule and hyperparameters are used.
        pair: B pairs, with what the rule needs.
        seed: of rules that sample tokens.
    """
    rule = spec.method.weight_rule.function
    weights = rule(pair, seed=seed, **spec.arguments(rule))
    return TokenWeights(weights.chosen, weights.rejected, _weight_metrics(pair, weights) | weights.metrics)


def shared_prefix_gradient(weights: TokenWeights, batch: SequenceBatch) -> Tensor:
    """(B,) sum of |w_chosen - w_rejected| over the tokens that both completions begin with.

    These tokens are predicted from the same context, so their log-probabilities cancel in a margin that weights both
    sides alike (DPO: 0). What is left trains tokens that say nothing about the preference.

    Args:
        weights: of B pairs.
        batch: their 2B sequences, chosen first.
    """
    (ids_c, ids_r), (mask_c, mask_r) = batch.targets.chunk(2), batch.mask.chunk(2)
    shared = ((ids_c == ids_r) & mask_c & mask_r).long().cumprod(-1)
    width = min(weights.chosen.shape[1], weights.rejected.shape[1])
    return ((weights.chosen[:, :width] - weights.rejected[:, :width]).abs() * shared[:, :width]).sum(-1)


def _weight_metrics(pair: PairLogProbs, weights: TokenWeights) -> dict[str, Tensor]:
    """(B,) metrics of each side's weights: normalised entropy of |w| (1 = even, 0 = all on one token) and effective
    tokens (sum w)^2 / sum w^2; and of the pair the smallest and largest weight (0 without tokens).
    """
    metrics: dict[str, Tensor] = {}
    lows, highs = [], []
    for name, side, mask in (
        ("chosen", weights.chosen, pair.chosen.mask),
        ("rejected", weights.rejected, pair.rejected.mask),
    ):
        total = side.abs().sum(-1)
        fraction = side.abs() / torch.where(total > 0, total, 1.0)[:, None]
        nats = -torch.special.xlogy(fraction, fraction).sum(-1)
        length = mask.sum(-1)
        entropy = torch.where(length > 1, nats / length.clamp(min=2).log(), (total > 0).to(nats.dtype))
        metrics[f"weights/entropy_{name}"] = entropy
        metrics[f"weights/effective_tokens_{name}"] = side.sum(-1) ** 2 / side.square().sum(-1).clamp(min=1e-30)
        if mask.shape[1]:
            lows.append(side.masked_fill(~mask, torch.inf).amin(-1))
            highs.append(side.masked_fill(~mask, -torch.inf).amax(-1))
    if lows:
        for name, extreme in (("min", torch.stack(lows).amin(0)), ("max", torch.stack(highs).amax(0))):
            metrics[f"weights/{name}"] = torch.where(torch.isinf(extreme), 0.0, extreme)
    return metrics
