"""Losses of pairs that couple the pairs of the global batch: they compare sorted values.

Notation: s = sum_t w_t log pi_t of a completion with token weights w, s_ref the same of the reference, r = s - s_ref.

Each loss has a `*_values` function, which gives the (B, 2) values of B pairs. The step first collects the values of
all n pairs of the global batch, over micro-batches and ranks, and passes them to the loss as `global_values` (n, 2).
Without them, the B pairs are the global batch. A pair is compared with the value at its own rank, as if the whole batch
were sorted.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from otpo.methods.losses.pairwise import log_ratios, reward_metrics
from otpo.records import LossOutput, PairLogProbs, TokenWeights


def aot(
    pair: PairLogProbs,
    weights: TokenWeights,
    *,
    beta: float,
    label_smoothing: float,
    global_values: Tensor | None = None,
) -> LossOutput:
    """sum_k of -log sigma(beta (sort(s_chosen - s_rejected)_k - sort(s_ref,chosen - s_ref,rejected)_k)), smoothed.

    AOT, paired, https://arxiv.org/abs/2406.05882. As TRL's `aot`, which sorts its micro-batch, not the global batch.
    """
    values = aot_values(pair, weights)
    partner = _at_rank_of(values[:, 0], global_values, by=0, take=1, own=values)
    losses = _smoothed(beta * (values[:, 0] - partner), label_smoothing)
    return LossOutput(losses, _metrics(pair, weights, beta))


def aot_values(pair: PairLogProbs, weights: TokenWeights) -> Tensor:
    """(B, 2) margins of the policy and of the reference."""
    return torch.stack(
        [
            (weights.chosen * chosen).sum(-1) - (weights.rejected * rejected).sum(-1)
            for chosen, rejected in (
                (pair.chosen.policy, pair.rejected.policy),
                (pair.chosen.frozen_logps("reference"), pair.rejected.frozen_logps("reference")),
            )
        ],
        dim=-1,
    )


def aot_unpaired(
    pair: PairLogProbs,
    weights: TokenWeights,
    *,
    beta: float,
    label_smoothing: float,
    global_values: Tensor | None = None,
) -> LossOutput:
    """sum_k of -log sigma(beta (sort(r_chosen)_k - sort(r_rejected)_k)), smoothed.

    AOT, unpaired, https://arxiv.org/abs/2406.05882. As TRL's `aot_unpaired`. The value of each term is split equally
    between the pair of its chosen and the pair of its rejected completion; each completion has the whole term's
    gradient.
    """
    values = aot_unpaired_values(pair, weights)
    chosen, rejected = values.unbind(-1)
    as_chosen = _smoothed(
        beta * (chosen - _at_rank_of(chosen, global_values, by=0, take=1, own=values)), label_smoothing
    )
    as_rejected = _smoothed(
        beta * (_at_rank_of(rejected, global_values, by=1, take=0, own=values) - rejected), label_smoothing
    )
    both = as_chosen + as_rejected
    return LossOutput(both - both.detach() / 2, _metrics(pair, weights, beta))


def aot_unpaired_values(pair: PairLogProbs, weights: TokenWeights) -> Tensor:
    """(B, 2) r of the chosen and of the rejected completions."""
    return torch.stack(log_ratios(pair, weights), dim=-1)


def _at_rank_of(values: Tensor, global_values: Tensor | None, *, by: int, take: int, own: Tensor) -> Tensor:
    """(B,) entries of the sorted column `take`, at the ranks that `values` have in column `by`. No gradient."""
    columns = (own if global_values is None else global_values).detach()
    if not len(columns):
        return values.detach()
    known, values = columns[:, by].sort().values, values.detach().contiguous()
    above = torch.searchsorted(known, values).clamp(max=len(known) - 1)
    below = (above - 1).clamp(min=0)
    # take the nearest: a value that is computed twice may differ in its last bits
    ranks = torch.where((known[above] - values).abs() <= (known[below] - values).abs(), above, below)
    return columns[:, take].sort().values[ranks]


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


def _metrics(pair: PairLogProbs, weights: TokenWeights, beta: float) -> dict[str, Tensor]:
    chosen, rejected = log_ratios(pair, weights)
    return reward_metrics(pair, beta * chosen, beta * rejected)
