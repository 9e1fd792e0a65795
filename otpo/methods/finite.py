"""Checks that models gave finite numbers, before anything is learned from them.

The checks of a step are tensors that travel with its losses and are read once, at its end (`otpo.training.step`):
reading one earlier would make the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from otpo.errors import WorkError
from otpo.records import LogProbs, PairLogProbs

SHOWN = 8  # places in a message


def not_finite(sides: Mapping[str, LogProbs]) -> dict[str, Tensor]:
    """Where models gave NaN or infinity for completions.

    Args:
        sides: what the completions are -> their records, of the same data rows.

    Returns:
        What it is (the model and the completion) -> (B,) bool, True where a token's is not finite.
    """
    sums: dict[str, Tensor] = {}  # a sum is finite if all its terms are: log-probabilities are far from overflowing
    for name, side in sides.items():
        values = {"log-probabilities of the policy": side.policy}
        values |= {f"log-probabilities of '{model}'": logps for model, logps in side.frozen.items()}
        values |= {f"'{what}'": figures for what, figures in side.vocabulary.items()}
        for what, tensor in values.items():
            sums[f"{what}, {name}"] = torch.where(side.mask, tensor.detach(), 0.0).sum(-1)
        if side.hidden is not None and side.hidden.shape[1]:
            largest = side.hidden.abs().amax(-1)
            sums[f"hidden states, {name}"] = torch.where(side.mask, largest, 0.0).amax(-1)
    finite = torch.isfinite(torch.stack(list(sums.values())))
    return dict(zip(sums, ~finite, strict=True))


def pair_sides(pair: PairLogProbs) -> dict[str, LogProbs]:
    """The sides of pairs as `not_finite` takes them."""
    return {"chosen completion": pair.chosen, "rejected completion": pair.rejected}


def places(flags: Mapping[str, Tensor], rows: Sequence[int]) -> list[str]:
    """The data rows where numbers are not finite, and what is not. Waits for the device.

    Args:
        flags: from `not_finite`.
        rows: the data row of each item.
    """
    if not flags:
        return []
    bad = torch.stack(list(flags.values())).tolist()
    return [
        f"data row {row}: {what}"
        for what, of_items in zip(flags, bad, strict=True)
        for row, is_bad in zip(rows, of_items, strict=False)
        if is_bad and row >= 0
    ]


def raise_not_finite(found: Sequence[str]) -> None:
    """Raise a `WorkError` that names the `places`, if there are any."""
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise WorkError(
            f"Expected finite numbers from the models, found NaN or infinity in {'; '.join(found[:SHOWN])}{more}. "
            "Look at these rows; if they are sound, lower the learning rate or train in float32."
        )


def check_finite(pair: PairLogProbs) -> None:
    """Check what models gave for pairs, at once.

    Raises:
        WorkError: a number is NaN or infinite; the message names the data rows and sides.
    """
    raise_not_finite(places(not_finite(pair_sides(pair)), pair.chosen.rows.tolist()))
