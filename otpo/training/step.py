"""One optimisation step over one global batch: what a training worker calls and what the benchmark times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from otpo.errors import WorkError
from otpo.methods.finite import check_finite
from otpo.methods.losses import pair_loss
from otpo.methods.spec import MethodSpec
from otpo.methods.weights import shared_prefix_gradient, token_weights
from otpo.models.logprobs import Predictions
from otpo.models.policy import PolicyModel, pair_logprobs
from otpo.records import LossOutput, PairLogProbs, SequenceBatch, TokenWeights

LossFunction = Callable[[SequenceBatch], LossOutput]


class Reference(Protocol):
    """The frozen start: a model of its own, or the policy without its adapters."""

    def predictions(self, batch: SequenceBatch) -> Predictions:
        """See `PolicyModel.predictions`."""


@dataclass(frozen=True)
class CoupledLosses:
    """A loss that couples the pairs of the global batch.

    Attributes:
        collect: batch -> (B, k) values of its pairs that the others' losses depend on.
        losses: (batch, the (n, k) values of all n pairs of the global batch) -> the batch's losses.
    """

    collect: Callable[[SequenceBatch], Tensor]
    losses: Callable[[SequenceBatch, Tensor], LossOutput]


def learning_rate(step: int, total: int, base: float, *, scheduler: str, warmup_ratio: float) -> float:
    """Learning rate of step `step` (from 0) of `total`, as transformers' schedulers of the same names."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return base * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return (
        base * {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[scheduler]
    )


def adamw(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what is trained. Norms and biases do not decay, as with transformers' Trainer."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)
    # the fused kernel does not raise the weights' version counters, which `otpo.kernels.mixed_precision` goes by
    optimizer.register_step_post_hook(lambda *_: increment_version(trained))
    return optimizer


def micro_batches(
    tokens: Sequence[int], *, size: int, budget: int | None = None, rank: int, world: int
) -> list[list[int]]:
    """Which items of a global batch this rank computes, and in which micro-batches.

    Items are dealt by length: where sequences are padded, little is. Every rank gets the same number of micro-batches,
    empty ones where there are too few, because collectives must be entered by all.

    Args:
        tokens: of each item. size: items in a micro-batch, at most.
        budget: tokens in a micro-batch, at most; an item with more has one of its own. None: any number.

    Returns:
        Lists of indices into `tokens`; over all ranks each index appears exactly once.
    """
    order = sorted(range(len(tokens)), key=lambda i: (-tokens[i], i))
    # a batch smaller than world * size is spread over the ranks rather than given to the first
    size = max(1, min(size, math.ceil(len(order) / world)))
    groups: list[list[int]] = []
    for index in order:
        full = not groups or len(groups[-1]) == size
        if full or (budget is not None and sum(tokens[i] for i in groups[-1]) + tokens[index] > budget):
            groups.append([])
        groups[-1].append(index)
    mine = groups[rank::world]
    return mine + [[]] * (math.ceil(len(groups) / world) - len(mine))


def preference_losses(
    model: PolicyModel,
    spec: MethodSpec,
    frozen: Callable[[SequenceBatch], dict[str, Tensor]],
    *,
    seed: int,
    reference: Reference | None = None,
) -> LossFunction | CoupledLosses:
    """The loss of a preference method as a function of a batch.

    Args:
        frozen: batch -> name of a frozen model -> its (2B, T) log-probabilities.
        seed: for rules that sample tokens; the same for policy and reference.
        reference: the frozen start itself, for methods that need its whole distribution ("reference_kl").
    """

    def record(batch: SequenceBatch) -> tuple[PairLogProbs, TokenWeights]:
        predictions = None
        if "reference_kl" in spec.method.needs:
            assert reference is not None, f"{spec.method.name} needs the reference model beside the policy"
            with torch.no_grad():
                predictions = reference.predictions(batch)
        logps, extras = model(batch, spec.method.needs, predictions, spec.layer)
        pairs = pair_logprobs(logps, extras, batch, frozen(batch))
        check_finite(pairs)
        if spec.hyperparameters["swap_answers"]:
            pairs = PairLogProbs(pairs.rejected, pairs.chosen)
        with torch.no_grad():
            weights = token_weights(spec, pairs, seed=seed)
        return pairs, weights

    def losses(batch: SequenceBatch, global_values: Tensor | None = None) -> LossOutput:
        pairs, weights = record(batch)
        output = pair_loss(spec, pairs, weights, global_values)
        about = {
            "lengths/chosen": pairs.chosen.lengths,
            "lengths/rejected": pairs.rejected.lengths,
            "weights/shared_prefix_gradient": shared_prefix_gradient(weights, batch),
        }
        return LossOutput(output.losses, output.metrics | about)

    collect = spec.method.loss.collect
    return CoupledLosses(lambda batch: collect(*record(batch)), losses) if collect else losses


def supervised_losses(model: PolicyModel) -> LossFunction:
    """Negative log-likelihood of each completion, summed over its tokens."""

    def losses(batch: SequenceBatch) -> LossOutput:
        logps, _ = model(batch)
        lengths = batch.mask.sum(-1)
        return LossOutput(
            -logps.sum(-1),
            {"lengths/completion": lengths, "logps/token": logps.detach().sum(-1) / lengths.clamp(min=1)},
        )

    return losses


def optimisation_step(
    model: PolicyModel,
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
        denominator: what the summed loss of the *global* batch is divided by (pairs, or tokens for supervised
            training), so that worker count and accumulation do not change the update.

    Returns:
        The global batch's figures: "loss", "grad_norm", "learning_rate", "tokens", and the mean of every metric.

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
    if norm > max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(trained, max_grad_norm, total_norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return figures | {"grad_norm": norm, "learning_rate": lr}


@torch.no_grad()
def evaluate(
    batches: Iterable[SequenceBatch], losses: LossFunction | CoupledLosses, *, denominator: float
) -> dict[str, float]:
    """The same figures as a step's, without an update, under TRL's `eval_` names."""
    batches = list(batches)
    losses = _uncoupled(losses, batches)
    totals = _Totals()
    for batch in batches:
        totals.add(losses(batch), batch)
    return {f"eval_{name}": value for name, value in totals.reduce(denominator).items()}


@torch.no_grad()
def _uncoupled(losses: LossFunction | CoupledLosses, batches: Sequence[SequenceBatch]) -> LossFunction:
    """The loss of a batch, with what it needs to know of the global batch collected by a pass over it."""
    if not isinstance(losses, CoupledLosses):
        return losses
    found = [losses.collect(batch) for batch in batches]
    values = torch.cat([v[batch.rows[: len(v)] >= 0] for v, batch in zip(found, batches, strict=True)])
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
        # as TRL counts them: the prompt with each answer
        real_tokens = (torch.tensor(batch.lengths, device=batch.rows.device) * (batch.rows >= 0)).sum()
        parts = {"loss": total.detach(), "count": valid.sum(), "tokens": real_tokens}
        parts |= {name: torch.where(valid, value.detach().float(), 0.0).sum() for name, value in output.metrics.items()}
        for name, value in parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.double()
        return total

    def reduce(self, denominator: float) -> dict[str, float]:
        names = sorted(self.sums)
        flat = torch.stack([self.sums[name] for name in names])
        if dist.is_initialized():
            dist.all_reduce(flat)
        sums = dict(zip(names, flat.tolist(), strict=True))
        loss, count, tokens = sums.pop("loss"), sums.pop("count"), sums.pop("tokens")
        return (
            {"loss": loss / denominator}
            | {name: value / max(1.0, count) for name, value in sums.items()}
            | {"tokens": tokens}
        )
