"""Means over training seeds: how much of a difference is more than what another seed would have done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its 95 % interval, None where one seed alone has a figure, or all have the same."""

    value: float
    low: float | None
    high: float | None
    n: int


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """The mean and its interval by Student's t with n - 1 degrees of freedom.

    Seeds are what is drawn: each is a training of its own. The t interval is exact for normal values; with five seeds
    it is wide, as it should be. Seeds that all have the same figure say nothing of how far another may be from it.

    Args:
        values: (n,) a figure of each seed.
    """
    from scipy.stats import t

    x = np.asarray(values, dtype=float)
    mean, n = float(x.mean()), len(x)
    if n < 2 or np.ptp(x) <= 1e-9 * np.abs(x).max():
        return Mean(mean, None, None, n)
    half = float(t.ppf(0.5 + CONFIDENCE / 2, n - 1) * x.std(ddof=1) / np.sqrt(n))
    return Mean(mean, mean - half, mean + half, n)


def by_label(table: pd.DataFrame) -> dict[tuple[str, str], Mean]:
    """(label, figure) -> its mean over seeds.

    Args:
        table: columns seed, label, figure, value, of one regime.
    """
    groups = table.groupby(["label", "figure"], sort=False)["value"]
    return {(str(label), str(figure)): mean_over_seeds(values.tolist()) for (label, figure), values in groups}  # type: ignore[misc]


def differences(table: pd.DataFrame, label: str, other: str) -> dict[str, Mean]:
    """Figure -> the mean over seeds of what `label` has more than `other`.

    A seed is a world, its pairs and an order of rows, which both share: what is hard about it cancels out.
    """
    values = table.pivot_table(index=["figure", "seed"], columns="label", values="value", sort=False)
    if not {label, other} <= set(values):
        return {}
    change = (values[label] - values[other]).dropna()
    return {str(figure): mean_over_seeds(each.tolist()) for figure, each in change.groupby(level="figure", sort=False)}
