"""The names of the figures that an evaluation gives, known before anything is trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from otpo.methods import FROZEN_MODELS
from otpo.methods.spec import MethodSpec
from otpo.records import PromptCompletions, SequenceBatch, TokenCompletion, TokenPair
from otpo.training.objectives import objective_of
from otpo.training.step import evaluate


def evaluation_figures(spec: MethodSpec, sets: Sequence[str] = ()) -> frozenset[str]:
    """What an evaluation of a method gives, such as eval_loss, told by one of two made-up rows.

    Args:
        sets: names of the data sets of a mix, each of which has figures of its own.
    """
    objective = objective_of(spec, seed=0)
    items: list[Any] = [TokenPair(row, [0], [1, 2], [3]) for row in (0, 1)]
    if spec.method.objective == "unpaired":
        items = [TokenCompletion(row, [0], [1, 2], label=bool(row), mismatched_ids=[3]) for row in (0, 1)]
    losses = objective.losses(_Model(), items, _Frozen())
    denominator = objective.denominator(items)
    rows = dict.fromkeys(sets, (0, 2))
    return frozenset(evaluate([objective.collate(items)], losses, denominator=denominator, sets=rows))


class _Model:
    """Gives every token the same log-probability, and every completion the same score."""

    def __call__(
        self, batch: SequenceBatch, wanted: Collection[str] = (), reference: Any = None, layer: int = -1
    ) -> tuple[Tensor, dict[str, Tensor]]:
        logps = -1.0 * batch.mask
        hidden = batch.mask[..., None] * torch.tensor([1.0, 2.0])
        return logps, {"hidden": hidden, "log_sum_squares": logps, "reference_kl": 0 * logps}

    def scores(self, batch: SequenceBatch) -> Tensor:
        return torch.zeros(len(batch.mask))


class _Frozen:
    """Frozen models that give what `_Model` gives."""

    def cached(self, items: Sequence[PromptCompletions]) -> dict[str, Any]:
        return dict.fromkeys(("reference", *FROZEN_MODELS), self)

    def logprobs(self, keys: Sequence[int], which: int, mask: Tensor) -> Tensor:
        return -1.0 * mask[:1].expand(len(keys), -1)

    def live_reference(self) -> Any:
        return self

    def lazy_logits(self, batch: SequenceBatch) -> Any:
        return None
