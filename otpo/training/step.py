"""One optimisation step over one global batch: what a training worker calls and what the benchmark times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from otpo.errors import WorkError
from otpo.methods.finite import places, raise_not_finite
from otpo.ranks import of_all_ranks, world_size
from otpo.records import LossOutput, SequenceBatch, on_device
from otpo.training.optimizer import set_learning_rate

LossFunction = Callable[[SequenceBatch], LossOutput]
NOT_FINITE = "not finite"  # beside the metrics of a step: how many numbers are not


@dataclass(frozen=True)
class CoupledLosses:
    """Losses that depend on the whole global batch.

    Attributes:
        collect: batch -> values of its rows that the losses of the others depend on.
        losses: (batch, the (n, k) values of all n rows of the global batch) -> the batch's losses.
    """

    collect: Callable[[SequenceBatch], Collected]
    losses: Callable[[SequenceBatch, Tensor], LossOutput]


@dataclass(frozen=True)
class Collected:
    """Values of a batch's rows that the losses of the whole global batch depend on.

    Attributes:
        values: (B, k), without gradient.
        not_finite: as in `LossOutput`.
    """

    values: Tensor
    not_finite: dict[str, Tensor] = field(default_factory=dict)


def optimisation_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[SequenceBatch],
    losses: LossFunction | CoupledLosses,
    *,
    denominator: float,
    max_grad_norm: float,
    lr: float,
    reduce_each: bool = False,
) -> dict[str, float]:
    """Accumulate gradients over this rank's micro-batches and update once.

    The host waits for the device once, at the end: a GPU computes a micro-batch while the next one is being launched.

    Args:
        batches: this rank's micro-batches.
        reduce_each: whether ranks reduce the gradients of each micro-batch. Otherwise they do it once a step, and keep
            the sum of unsharded gradients until then: 4 bytes a parameter on every rank. Under hybrid sharding nodes
            add up theirs once a step either way.
        denominator: what the summed loss of the *global* batch is divided by (pairs, or tokens for supervised
            training), so that worker count and gradient accumulation do not change the update.
        max_grad_norm: larger gradients are clipped to it; 0 clips none.

    Returns:
        Figures of the global batch: "loss", "grad_norm", "learning_rate", "tokens", and the mean of every metric.

    Raises:
        WorkError: a loss or the gradient norm is not finite; the message names the data rows.
    """
    world = world_size()
    batches = list(batches)
    losses = uncoupled(losses, batches)
    totals = Totals()
    for number, batch in enumerate(batches):
        if isinstance(model, FSDPModule):
            last = number == len(batches) - 1
            model.set_requires_gradient_sync(reduce_each or last)
            model.set_requires_all_reduce(last)
        output = losses(batch)
        total = totals.add(output, batch)
        # FSDP averages gradients over ranks; the loss is already divided by a global count
        (total * (world / denominator)).backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    total_norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    figures = totals.reduce(
        denominator, grad_norm=total_norm.full_tensor() if isinstance(total_norm, DTensor) else total_norm
    )
    norm = figures["grad_norm"]
    if not math.isfinite(figures["loss"]) or not math.isfinite(norm):
        raise WorkError(
            f"The loss is {figures['loss']} and the gradient norm {norm}: not finite. Data rows with such a loss on"
            f" this worker: {totals.bad_rows() or 'none'}. Lower the learning rate, or look at them with `otpo data`."
        )
    if max_grad_norm and norm > max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(trained, max_grad_norm, total_norm)
    set_learning_rate(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return figures | {"learning_rate": lr}


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
    losses = uncoupled(losses, batches)
    totals, parts = Totals(), {name: Totals() for name in sets or {}}
    for batch in batches:
        output = losses(batch)
        totals.add(output, batch)
        for name, (first, end) in (sets or {}).items():
            inside = (batch.rows >= first) & (batch.rows < end)
            numbers = tuple(row if first <= row < end else -1 for row in batch.row_numbers)
            parts[name].add(output, replace(batch, rows=torch.where(inside, batch.rows, -1), row_numbers=numbers))
    figures = {f"eval_{name}": value for name, value in totals.reduce(denominator).items()}
    for name, part in parts.items():
        found = part.reduce()
        figures |= {f"eval_{name}_{metric}": value for metric, value in found.items() if metric != "tokens"}
    return figures


@torch.no_grad()
def uncoupled(losses: LossFunction | CoupledLosses, batches: Iterable[SequenceBatch]) -> LossFunction:
    """A loss of single batches: for coupled losses, a first pass over the global batch collects what they need."""
    if not isinstance(losses, CoupledLosses):
        return losses
    kept, wrong, device = [], [], None
    for batch in batches:
        part = losses.collect(batch)
        rows, device = batch.row_numbers[: len(part.values)], part.values.device
        kept.append(part.values.cpu()[torch.tensor(rows) >= 0])
        wrong += places(part.not_finite, rows)
    parts = of_all_ranks((torch.cat(kept), wrong))
    raise_not_finite([place for _, places_of_rank in parts for place in places_of_rank])
    global_values = torch.cat([values for values, _ in parts]).to(device)
    coupled = losses.losses
    return lambda batch: coupled(batch, global_values)


class Totals:
    """Sums over this rank's micro-batches, reduced over ranks once a step."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts = [0, 0]  # items, tokens
        self.seen: list[tuple[tuple[int, ...], Tensor, dict[str, Tensor]]] = []

    def add(self, output: LossOutput, batch: SequenceBatch) -> Tensor:
        """Take in a micro-batch; gives the sum of its losses. The host does not wait."""
        rows = batch.row_numbers[: len(output.losses)]
        valid = batch.rows[: len(output.losses)] >= 0
        total = torch.where(valid, output.losses, torch.zeros_like(output.losses)).sum()
        # summed together: each sum by itself would be several launches on a GPU
        metrics = torch.stack(
            [value.detach().float() for value in output.metrics.values()] or [total.new_zeros(len(rows))]
        )
        sums = torch.where(valid, metrics, 0.0).sum(-1).double()
        parts = dict(zip(output.metrics, sums, strict=False)) | {"loss": total.detach().double()}
        if output.not_finite:
            parts[NOT_FINITE] = (torch.stack(list(output.not_finite.values())) & valid).sum().double()
        for name, value in parts.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.counts[0] += sum(row >= 0 for row in rows)
        # as TRL counts them: the prompt with each completion
        lengths = zip(batch.lengths, batch.row_numbers, strict=True)
        self.counts[1] += sum(length for length, row in lengths if row >= 0)
        self.seen.append((rows, output.losses.detach(), output.not_finite))
        return total

    def bad_rows(self) -> list[int]:
        """Data rows of this rank whose loss is not finite."""
        return [
            row
            for rows, losses, _ in self.seen
            for row, is_finite in zip(rows, losses.isfinite().tolist(), strict=True)
            if row >= 0 and not is_finite
        ]

    def reduce(self, denominator: float | None = None, **known: Tensor) -> dict[str, float]:
        """The figures of the global batch. The host waits for the device, and ranks for each other.

        Args:
            denominator: of the loss; by default the number of items.
            known: figures that all ranks have already; they come to the host in the same transfer.

        Raises:
            WorkError: a model gave numbers that are not finite.
        """
        names = sorted(self.sums)
        flat = torch.stack([self.sums[name] for name in names])
        flat = torch.cat([flat, on_device(torch.tensor(self.counts, dtype=flat.dtype), flat.device)])
        if dist.is_initialized():
            dist.all_reduce(flat)
        found = torch.cat([flat, *(value.to(flat).reshape(1) for value in known.values())]).tolist()
        sums = dict(zip(names, found, strict=False))
        count, tokens = found[len(names) : len(names) + 2]
        if sums.pop(NOT_FINITE, 0):
            self._raise_not_finite()
        loss = sums.pop("loss")
        return (
            {"loss": loss / (max(1.0, count) if denominator is None else denominator)}
            | {name: value / max(1.0, count) for name, value in sums.items()}
            | {"tokens": tokens}
            | dict(zip(known, found[len(names) + 2 :], strict=True))
        )

    def _raise_not_finite(self) -> None:
        """All ranks raise the same error, whichever of them has the rows."""
        found = of_all_ranks([place for rows, _, flags in self.seen for place in places(flags, rows)])
        raise_not_finite([place for of_rank in found for place in of_rank])
