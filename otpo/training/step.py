"""One optimisation step over one global batch: what a training worker calls and what the benchmark times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from otpo.errors import WorkError
from otpo.records import LossOutput, SequenceBatch

LossFunction = Callable[[SequenceBatch], LossOutput]


@dataclass(frozen=True)
class CoupledLosses:
    """Losses that depend on the whole global batch.

    Attributes:
        collect: batch -> (B, k) values of its rows that the losses of the others depend on.
        losses: (batch, the (n, k) values of all n rows of the global batch) -> the batch's losses.
    """

    collect: Callable[[SequenceBatch], Tensor]
    losses: Callable[[SequenceBatch, Tensor], LossOutput]


def optimisation_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[SequenceBatch],
    losses: LossFunction | CoupledLosses,
    *,
    denominator: float,
    max_grad_norm: float,
    lr: float,
) -> dict[str, float]:
    """Accumulate gradients over this rank's micro-batches and update once.

    Args:
        batches: this rank's micro-batches.
        denominator: what the summed loss of the *global* batch is divided by (pairs, or tokens for supervised
            training), so that worker count and gradient accumulation do not change the update.
        max_grad_norm: larger gradients are clipped to it; 0 clips none.

    Returns:
        Figures of the global batch: "loss", "grad_norm", "learning_rate", "tokens", and the mean of every metric.

    Raises:
        WorkError: a loss or the gradient norm is not finite; the message names the data rows.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    batches = list(batches)
    losses = _uncoupled(losses, batches)
    totals = _Totals()
    for number, batch in enumerate(batches):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(number == len(batches) - 1)
        output = losses(batch)
        total = totals.add(output, batch)
        # FSDP averages gradients over ranks; the loss is already divided by a global count
        (total * (world / denominator)).backward()
    figures = totals.reduce(denominator)
    trained = [p for p in model.parameters() if p.grad is not None]
    total_norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    norm = (total_norm.full_tensor() if isinstance(total_norm, DTensor) else total_norm).item()
    if not math.isfinite(figures["loss"]) or not math.isfinite(norm):
        raise WorkError(
            f"The loss is {figures['loss']} and the gradient norm {norm}: not finite. Data rows with such a loss on"
            f" this worker: {totals.bad_rows or 'none'}. Lower the learning rate, or look at them with `otpo data`."
        )
    if max_grad_norm and norm > max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(trained, max_grad_norm, total_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return figures | {"grad_norm": norm, "learning_rate": lr}


@torch.no_grad()
def evaluate(
    batches: Iterable[SequenceBatch],
    losses: LossFunction | CoupledLosses,
    *,
    denominator: float,
    sets: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, float]:
    """The figures of a step without an update, under TRL's `eval_` names.

    Args:
        batches: are not held, but gone over twice for coupled losses.
        sets: name of a data set -> its rows are numbered from, to before. Its figures are means over its rows and have
            the names that the Trainer gives them: `eval_NAME_loss`.
    """
    losses = _uncoupled(losses, batches)
    totals, parts = _Totals(), {name: _Totals() for name in sets or {}}
    for batch in batches:
        output = losses(batch)
        totals.add(output, batch)
        for name, (first, end) in (sets or {}).items():
            inside = (batch.rows >= first) & (batch.rows < end)
            parts[name].add(output, replace(batch, rows=torch.where(inside, batch.rows, -1)))
    figures = {f"eval_{name}": value for name, value in totals.reduce(denominator).items()}
    for name, part in parts.items():
        found = part.reduce()
        figures |= {f"eval_{name}_{metric}": value for metric, value in found.items() if metric != "tokens"}
    return figures


@torch.no_grad()
def _uncoupled(losses: LossFunction | CoupledLosses, batches: Iterable[SequenceBatch]) -> LossFunction:
    """A loss of single batches: for coupled losses, a first pass over the global batch collects what they need."""
    if not isinstance(losses, CoupledLosses):
        return losses
    values = torch.cat([(v := losses.collect(batch))[batch.rows[: len(v)] >= 0] for batch in batches])
    parts: list[Any] = [values.cpu()]
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, values.cpu())
    global_values = torch.cat(parts).to(values.device)
    coupled = losses.losses
    return lambda batch: coupled(batch, global_values)


class _Totals:
    """Sums over this rank's micro-batches, reduced over ranks once a step."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.bad_rows: list[int] = []

    def add(self, output: LossOutput, batch: SequenceBatch) -> Tensor:
        rows = batch.rows[: len(output.losses)]
        valid = rows >= 0
        total = torch.where(valid, output.losses, torch.zeros_like(output.losses)).sum()
        detached = output.losses.detach()
        self.bad_rows += rows[valid & ~detached.isfinite()].tolist()
        # as TRL counts them: the prompt with each completion
        real_tokens = (torch.tensor(batch.lengths, device=batch.rows.device) * (batch.rows >= 0)).sum()
        parts = {"loss": total.detach(), "count": valid.sum(), "tokens": real_tokens}
        parts |= {name: torch.where(valid, value.detach().float(), 0.0).sum() for name, value in output.metrics.items()}
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double()
        return total

    def reduce(self, denominator: float | None = None) -> dict[str, float]:
        names = sorted(self.sums)
        flat = torch.stack([self.sums[name] for name in names])
        if dist.is_initialized():
            dist.all_reduce(flat)
        sums = dict(zip(names, flat.tolist(), strict=True))
        loss, count, tokens = sums.pop("loss"), sums.pop("count"), sums.pop("tokens")
        return (
            {"loss": loss / (max(1.0, count) if denominator is None else denominator)}
            | {name: value / max(1.0, count) for name, value in sums.items()}
            | {"tokens": tokens}
        )
