"""What a training checks on a few real rows before its first step.

Log-probabilities are those of the model's own forward (`otpo.training.forward_check`) and repeat; the cached ones of
the reference are this model's; and the loss is the one that policy and reference have while they are equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from otpo.data.collate import collate_prompts
from otpo.errors import UserError
from otpo.models.policy import PolicyModel
from otpo.records import PromptCompletions, SequenceBatch
from otpo.training.forward_check import (
    TOLERANCES,
    Difference,
    ForwardCheck,
    agreed,
    difference,
    quietly,
    without_adapters_dropout,
)
from otpo.training.objectives import CachedLogProbs, Objective
from otpo.training.step import CoupledLosses, LossFunction, uncoupled

LONGEST = {"cpu": 512, "cuda": 8192}
"""Tokens of the longest row that is checked, by device: a forward pass of it takes well below a second."""
SAMPLE = 256  # rows among which those to check are chosen
SHORTEST = 2  # of these; and the longest that fits, because a sliding window shows only in long sequences

LOSS_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""How far the first loss may lie from that of a policy that equals its reference, as a fraction of max(1, loss): the
reference was computed in batches of another size, and rounding adds up over a completion's tokens."""


class Sized(Protocol):
    """What adds tokens to a batch."""

    @property
    def tokens(self) -> int:
        """How many."""


Row = TypeVar("Row", bound=Sized)


def choose_rows(items: Sequence[Row], device: str, budget: int | None = None) -> list[Row]:
    """A few rows to check: the `SHORTEST` first, then the longest that is not too long for a check of seconds.

    Args:
        budget: tokens of a micro-batch, which the longest row may not exceed either.
    """
    some = sorted(items[:SAMPLE], key=lambda item: item.tokens)
    chosen, rest = some[:SHORTEST], some[SHORTEST:]
    limit = LONGEST.get(device, min(LONGEST.values()))
    limit = limit if budget is None else min(limit, budget)
    return chosen + [item for item in rest if item.tokens <= limit][-1:]


@dataclass(frozen=True)
class StartCheck:
    """What was found before the first step.

    Attributes:
        what: was compared: "log-probabilities", or a reward model's "scores".
        completions: how many were compared.
        repeated: the largest difference between two passes over them.
        cached: between the cached log-probabilities of the reference and this model's, None without a reference.
        loss, expected: the loss of the rows, and that where the policy is the reference; None without a reference.
        seconds: that all this took.
    """

    forward: ForwardCheck
    what: str
    completions: int
    repeated: float
    cached: Difference | None
    loss: float | None
    expected: float | None
    seconds: float

    @property
    def fallback(self) -> str:
        """Why the fastest way to compute was not taken, as a sentence; empty if it was."""
        if not self.forward.fallbacks:
            return ""
        way = "The model's own head is run" if self.forward.head == "own" else "Batches are padded"
        return f"{way}, because faster ways compute other {self.what} ({'; '.join(self.forward.fallbacks)})"

    def __str__(self) -> str:
        layout = "flat and padded" if self.forward.also else self.forward.layout
        text = (
            f"{self.what} equal the model's own forward to {self.forward.difference.worst:.1g} ({self.completions}"
            f" completions, {layout} batches)"
        )
        text += f" and {f'differ by {self.repeated:.1g}' if self.repeated else 'are the same'} when computed again"
        if self.cached is not None:
            text += f"; the cached reference equals them to {self.cached.worst:.1g}"
        if self.loss is not None and self.expected is not None:
            log_two = " = ln 2" if abs(self.expected - math.log(2)) < 1e-6 else ""
            text += f"; loss {self.loss:.4f}, expected {self.expected:.4f}{log_two}"
        return f"{text}; {self.seconds:.1f} s" + (f". {self.fallback}." if self.fallback else "")

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        values = asdict(self)
        del values["forward"]["values"]
        also = self.forward.also
        if also is not None and not math.isfinite(also.worst):
            values["forward"]["also"] = str(also)  # JSON has no infinity
        return {"line": str(self), "fallback": self.fallback, **values}


# ---- the reference ----


def check_cached(
    model: PolicyModel, cache: CachedLogProbs, prompts: Sequence[PromptCompletions], dtype: torch.dtype, *, where: str
) -> Difference:
    """Compare cached log-probabilities of a frozen model with what the model computes now.

    Args:
        prompts: a few of those in the cache, each with the same number of completions.
        where: the cache's folder.

    Raises:
        UserError: they are another model's.
    """
    batch = collate_prompts(prompts).to(next(model.parameters()).device)
    with quietly(model), without_adapters_dropout(model):
        live = model(batch)[0].detach()
    keys, count = [prompt.key for prompt in prompts], len(prompts[0].completions)
    cached = torch.cat([cache.logprobs(keys, which, batch.mask) for which in range(count)])
    rows = batch.rows[:, None].expand_as(batch.mask)[batch.mask]
    found = difference(live[batch.mask], cached[batch.mask], rows)
    if not found.within(TOLERANCES[dtype]):
        raise UserError(
            f"The cached log-probabilities in {where} are not those of {model.lm.name_or_path}: the worst token"
            f" {found}. In the cache a token of key {found.row} has {found.found:.4f}, and the model gives"
            f" {found.own:.4f}. They were computed by another model or another version of the libraries: delete that"
            " folder, and they are computed again."
        )
    return found


class SameReference:
    """Frozen models (`otpo.training.objectives.FrozenModels`) of which the reference is the policy itself.

    Args:
        cached: the other frozen models.
    """

    def __init__(self, policy: PolicyModel, cached: Mapping[str, CachedLogProbs]):
        self.policy, self.others = policy, cached

    def cached(self, items: Iterable[PromptCompletions]) -> dict[str, CachedLogProbs]:
        """See `FrozenModels`."""
        return {**self.others, "reference": _Live(self.policy, list(items))}

    def live_reference(self) -> PolicyModel:
        """See `FrozenModels`."""
        return self.policy


class _Live:
    """A model's log-probabilities of the completions of a few prompts, as a cache gives them."""

    def __init__(self, model: PolicyModel, prompts: Sequence[PromptCompletions]):
        batch = collate_prompts(prompts).to(next(model.parameters()).device)
        self.logps = model(batch)[0].detach()
        self.keys = [prompt.key for prompt in prompts]

    def logprobs(self, keys: Sequence[int], which: int, mask: Tensor) -> Tensor:
        """See `CachedLogProbs`."""
        rows = [which * len(self.keys) + self.keys.index(key) for key in keys]
        width = mask.shape[1]
        return torch.nn.functional.pad(self.logps, (0, max(0, width - self.logps.shape[1])))[rows, :width]


def check_loss(
    model: PolicyModel,
    objective: Objective,
    rows: Sequence[Any],
    batch: SequenceBatch,
    losses: LossFunction | CoupledLosses,
    cached: Mapping[str, CachedLogProbs],
    dtype: torch.dtype,
) -> tuple[float, float]:
    """The loss of a few rows before the first step, and what it is where the policy is the reference: ln 2 for DPO.

    Args:
        rows, batch: the same on all ranks, as items and as the objective collates them.
        losses: as training computes them.
        cached: the log-probabilities of its frozen models.

    Raises:
        UserError: they differ: the policy does not begin at its reference.
    """
    with quietly(model), without_adapters_dropout(model):
        same = objective.losses(model, rows, SameReference(model, cached))
        loss, expected = (
            float(uncoupled(each, [batch])(batch).losses.detach().sum()) / objective.denominator(rows)
            for each in (losses, same)
        )
    apart = math.inf if math.isnan(loss - expected) else abs(loss - expected)
    if agreed(apart)[0] > LOSS_TOLERANCES[dtype] * max(1.0, abs(expected)):
        raise UserError(
            f"Before the first step the loss is {loss:.4f}; a policy that equals its reference has {expected:.4f}. So"
            f" the reference is not {model.lm.name_or_path}: delete the cached log-probabilities in `scorers` beside"
            " the run's folder, and they are computed again."
        )
    return loss, expected
