"""Training a reward model on preference pairs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from otpo.data.collate import collate_pairs
from otpo.data.rows import BadRow, Row, number_of
from otpo.errors import UserError
from otpo.methods.spec import MethodSpec
from otpo.models.reward_model import RewardModel, load_reward_lm
from otpo.records import LossOutput, SequenceBatch, TokenPair, on_device
from otpo.training.objectives.base import FrozenModels, Start
from otpo.training.step import LossFunction


@dataclass(frozen=True)
class RewardObjective:
    """The loss of a reward model, as a mean over pairs.

    Attributes:
        margins: data row -> by how much its chosen completion is better; None where the data has no margins.
    """

    spec: MethodSpec
    margins: Mapping[int, float] | None = None

    def load(self, start: Start) -> RewardModel:
        """See `Objective`. A start without a scalar head gets one of zeros."""
        return RewardModel(
            load_reward_lm(
                start.path,
                new_head=True,
                pad_id=start.pad_id,
                attn_implementation=start.attn_implementation,
                deferred=start.deferred,
            )
        )

    def collate(self, items: Sequence[TokenPair]) -> SequenceBatch:
        """See `Objective`."""
        return collate_pairs(items)

    def losses(self, model: RewardModel, items: Sequence[TokenPair], frozen: FrozenModels) -> LossFunction:
        """See `Objective`."""
        return reward_losses(model, self.spec, self.margins)

    def denominator(self, items: Sequence[TokenPair]) -> float:
        """Pairs."""
        return float(len(items))


def reward_losses(model: RewardModel, spec: MethodSpec, margins: Mapping[int, float] | None = None) -> LossFunction:
    """The loss of a reward model as a function of a batch of pairs.

    Args:
        margins: data row -> by how much its chosen completion is better.
    """
    loss = spec.method.loss.function

    def losses(batch: SequenceBatch) -> LossOutput:
        sides, lengths = list(model.scores(batch).chunk(2)), list(batch.mask.sum(-1).chunk(2))
        rows = batch.row_numbers[: len(sides[0])]
        bad = {
            f"scores of the reward model, {side} completion": ~torch.isfinite(scores.detach())
            for side, scores in zip(("chosen", "rejected"), sides, strict=True)
        }
        if spec.hyperparameters["swap_answers"]:
            sides, lengths = sides[::-1], lengths[::-1]
        margin = None
        if margins is not None:
            margin = on_device(torch.tensor([margins.get(row, 0.0) for row in rows]), batch.rows.device)
        output = loss(*sides, margin, **spec.arguments(loss))
        metrics = {"lengths/chosen": lengths[0], "lengths/rejected": lengths[1]}
        return LossOutput(output.losses, output.metrics | metrics, bad)

    return losses


# ---- margins ----


def margins_of(rows: Iterable[Row], numbers: Sequence[int], source: str) -> dict[int, float] | None:
    """The column `margin` of the pairs' rows, None where no row has one.

    Args:
        rows: are read one after the other, and not held. numbers: of the pairs' rows, ascending.

    Raises:
        UserError: a pair without a margin, or with one that is no finite number.
    """
    margins: dict[int, float] = {}
    wrong: tuple[int, str] | None = None
    seen, wanted = False, iter(numbers)
    number = next(wanted, None)
    for index, row in enumerate(rows):
        if number is None:
            break
        if index != number:
            continue
        number = next(wanted, None)
        seen = seen or row.get("margin") is not None
        try:
            margins[index] = number_of(row, "margin")
        except BadRow as reason:
            wrong = wrong or (index, f"{reason}, and other rows have one. Every pair of a reward model needs a finite"
                              " `margin`, or none of them may have that column.")  # fmt: skip
            continue
        if not math.isfinite(margins[index]):
            wrong = wrong or (index, f"expected a finite margin, found {margins[index]}.")
    if not seen:
        return None
    if wrong:
        raise UserError(f"{source}: row {wrong[0]}: {wrong[1]}")
    return margins


def save_margins(path: str | Path, margins: Mapping[int, float]) -> None:
    """Write margins as safetensors: `rows` int64, `margins` float32."""
    rows, values = np.array(list(margins), np.int64), np.array(list(margins.values()), np.float32)
    save_file({"rows": rows, "margins": values}, path)


def load_margins(path: str | Path) -> dict[int, float]:
    """What `save_margins` wrote."""
    arrays = load_file(path)
    return dict(zip(arrays["rows"].tolist(), arrays["margins"].tolist(), strict=True))
