"""Confidence intervals of means of bounded values: how sure a win rate, or a difference of two, is.

Prompts are what is drawn. Both orders of a prompt are averaged first, so they do not count as two prompts.

The interval is the empirical likelihood's (Owen 1988, doi:10.1093/biomet/75.2.237) of the values and of a part of an
observation at either bound, with the tail of Barndorff-Nielsen (1986, doi:10.1093/biomet/73.2.307) in place of the
chi-square. It is also the saddlepoint approximation of the Bayesian bootstrap (Rubin 1981) of those values. For values
that are 0 or 1, and halves of an observation, it is Jeffreys' interval of a proportion. The bounds are why it does not
collapse where all values are nearly equal: the next one may be any that the bounds allow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eval.stats.win_rate import valid_preferences

CONFIDENCE = 0.95
Z = 1.959963984540054
FEW_PROMPTS = 30
# The part of an observation at the bound that an end of the interval lies towards; the rest of one is at the other
# bound. Halves make tests of no difference exact; a little more makes intervals of rare wins never too short. Measured
# by `python -m tests.benchmarks.coverage`.
HALF, NEAR = 0.5, 0.6
ROWS_AT_ONCE = 2**19  # values that are worked on at a time


@dataclass(frozen=True)
class Interval:
    """A 95 % interval, in the units of its estimate.

    Attributes:
        low: lower end; None if no interval can be given.
        high: upper end; None if no interval can be given.
        note: why there is none, or what to know about it.
    """

    low: float | None
    high: float | None
    note: str = ""


def mean_intervals(
    values: npt.ArrayLike, bounds: tuple[float, float], near: float = HALF
) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals of the means that rows of bounded values are drawn from.

    Args:
        values: (r, n) within the bounds; NaN are left out.
        bounds: the least and the greatest value that there could be.
        near: the part of an observation at the bound that an end of the interval lies towards.

    Returns:
        (r,) lower and (r,) upper ends, which hold the mean of the row between them; NaN for a row of NaN.
    """
    x = np.atleast_2d(np.asarray(values, dtype=float))
    step = max(1, ROWS_AT_ONCE // max(x.shape[1], 1))
    parts = [_ends(x[start : start + step], bounds, near) for start in range(0, len(x), step)]
    low, high = (np.concatenate(ends) for ends in zip(*parts, strict=True)) if parts else (np.empty(0), np.empty(0))
    return low, high


def _ends(values: np.ndarray, bounds: tuple[float, float], near: float) -> tuple[np.ndarray, np.ndarray]:
    from scipy.optimize import elementwise

    least, greatest = bounds
    known = ~np.isnan(values)
    n, rows = known.sum(axis=1), np.arange(len(values))
    x = np.clip((np.where(known, values, least) - least) / (greatest - least), 0.0, 1.0)
    mean = x.sum(axis=1, where=known) / np.maximum(n, 1)
    x = np.concatenate([x, np.zeros((len(x), 1)), np.ones((len(x), 1))], axis=1)
    ends = []
    for sign, at_least, at_greatest, bracket in (
        (-1, near, 1 - near, (-40.0, -1e-4)),
        (1, 1 - near, near, (1e-4, 40.0)),
    ):
        extra = np.broadcast_to([at_least, at_greatest], (len(x), 2))
        weight = np.concatenate([known, extra], axis=1)

        def surplus(z: np.ndarray, row: np.ndarray, sign: int = sign, weight: np.ndarray = weight) -> np.ndarray:
            return _tilted(x[row], weight[row], z)[1] - sign * Z

        start, stop = (np.full(len(x), end) for end in bracket)
        with np.errstate(invalid="ignore", divide="ignore"):  # of scipy's own steps
            found = elementwise.find_root(surplus, (start, stop), args=(rows,))
        z = np.where(found.success, found.x, bracket[0] if sign < 0 else bracket[1])
        ends.append(_tilted(x, weight, z)[0])
    low, high = np.minimum(ends[0], mean), np.maximum(ends[1], mean)
    unknown = np.where(n > 0, 0.0, np.nan)
    return least + (greatest - least) * low + unknown, least + (greatest - least) * high + unknown


def _tilted(x: np.ndarray, weight: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean t under probabilities weight / (1 - u x) with u = 1 - exp(-z), and the normal quantile of t.

    Of all probabilities whose mean is t, these have the greatest empirical likelihood.
    """
    total = weight.sum(axis=1)
    middle = (weight * x).sum(axis=1) / total
    at_middle = (1.0 - middle) + middle * np.exp(-z)
    ratio = ((1.0 - x) + x * np.exp(-z)[:, None]) / at_middle[:, None]  # of 1 - u x to its value at the mean
    # What the ratio is above 1. Its weighted mean is 0, so the sums below need not cancel: of many nearly equal
    # verdicts rounding errors alone would be left.
    e = (x - middle[:, None]) * (np.expm1(-z) / at_middle)[:, None]
    q, logs, far = weight / ratio, np.log1p(e), np.abs(e) > 0.5
    logs[far] = np.log(ratio[far])
    t = (q * x).sum(axis=1) / q.sum(axis=1)
    deviance = 2.0 * (total * np.log1p((q * e * e).sum(axis=1) / total) + (weight * (logs - e)).sum(axis=1))
    root = np.sign(z) * np.sqrt(np.maximum(deviance, 0.0))
    slope = -np.expm1(-z) / at_middle * np.sqrt((weight * ((x - t[:, None]) / ratio) ** 2).sum(axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        adjusted = root + np.log(slope / root) / root
    return t, np.where(np.abs(root) > 1e-6, adjusted, root)


def win_rate_interval(preference: npt.ArrayLike) -> Interval:
    """95 % interval of `win_rate`, over prompts.

    Args:
        preference: (n,) preferences, NaN allowed.
    """
    values = valid_preferences(preference)
    chance = values[~np.isnan(values)] - 1
    n = len(chance)
    if n == 0:
        return Interval(None, None, "no verdict came back, so nothing can be said")
    low, high = mean_intervals(100 * chance, (0.0, 100.0), NEAR)
    note = ""
    if n == 1 or np.ptp(chance) == 0:
        note = "one verdict" if n == 1 else f"all {n} verdicts are equal: the interval says what the next may be"
    elif n < FEW_PROMPTS:
        note = f"only {n} prompts: the interval is rough"
    return Interval(float(low[0]), float(high[0]), note)
