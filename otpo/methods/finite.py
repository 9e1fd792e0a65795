"""Checks that models gave finite numbers, before a loss or a weight rule reads them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from otpo.errors import WorkError
from otpo.records import LogProbs, PairLogProbs


def check_finite(pair: PairLogProbs) -> None:
    """Check what models gave for pairs. Waits for the device once.

    Raises:
        WorkError: a number is NaN or infinite; the message names the data rows and sides.
    """
    check_sides({"chosen completion": pair.chosen, "rejected completion": pair.rejected})


def check_sides(sides: Mapping[str, LogProbs]) -> None:
    """`check_finite` for any completions of the same data rows; the keys name them in the message."""
    flags: dict[str, Tensor] = {}
    for name, side in sides.items():
        values = {"log-probabilities of the policy": side.policy}
        values |= {f"log-probabilities of '{model}'": logps for model, logps in side.frozen.items()}
        values |= {f"'{what}'": figures for what, figures in side.vocabulary.items()}
        if side.hidden is not None and side.hidden.shape[1]:
            values["hidden states"] = side.hidden.abs().amax(-1)
        for what, tensor in values.items():
            flags[f"{what}, {name}"] = (~torch.isfinite(tensor.detach()) & side.mask).any(-1)
    bad = torch.stack(list(flags.values())).cpu()
    if bad.any():
        rows = next(iter(sides.values())).rows.tolist()
        found = [
            f"data row {rows[index]}: {what}"
            for what, per_pair in zip(flags, bad.tolist(), strict=True)
            for index, is_bad in enumerate(per_pair)
            if is_bad
        ]
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        raise WorkError(
            f"Expected finite numbers from the models, found NaN or infinity in {'; '.join(found[:8])}{more}. "
            "Look at these rows; if they are sound, lower the learning rate or train in float32."
        )
