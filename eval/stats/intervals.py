"""Confidence intervals: how sure an estimate is.

Prompts are what is resampled. Both orders of a prompt are averaged first, so they do not count as two prompts.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eval.stats.win_rate import valid_preferences

CONFIDENCE = 0.95
RESAMPLES = 2000
FEW_PROMPTS = 30


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


def bootstrap_mean(values: npt.ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Bias-corrected and accelerated (BCa) bootstrap interval of a mean, by `scipy.stats.bootstrap`.

    Args:
        values: (n,) one value a prompt; NaN are left out.
        seed: the same values and seed give the same interval.
        resamples: number of resamples.
    """
    from scipy.stats import bootstrap

    x = np.asarray(values, dtype=float)
    x = x[~np.isnan(x)]
    if len(x) < 2 or np.ptp(x) == 0:
        return Interval(None, None, "no value" if not len(x) else "every value is the same")
    low = high = math.nan
    for method in ("BCa", "percentile"):  # BCa is undefined for a few degenerate samples
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = bootstrap(
                (x,),
                np.mean,
                n_resamples=resamples,
                confidence_level=CONFIDENCE,
                method=method,
                batch=max(1, 2_000_000 // len(x)),
                rng=np.random.default_rng(seed),
            )
        low, high = float(result.confidence_interval.low), float(result.confidence_interval.high)
        if math.isfinite(low) and math.isfinite(high):
            break
    return Interval(low, high)


def win_rate_interval(preference: npt.ArrayLike, *, seed: int = 0) -> Interval:
    """95 % interval of `win_rate`, over prompts.

    If all verdicts are equal, a bootstrap interval has no width and would claim certainty after three prompts. In that
    case this is Wilson's score interval for a proportion. It is never too narrow for values in [0, 1], whose variance
    is at most p (1 - p).

    Args:
        preference: (n,) preferences, NaN allowed.
        seed: of the bootstrap.
    """
    values = valid_preferences(preference)
    chance = values[~np.isnan(values)] - 1
    n = len(chance)
    if n == 0:
        return Interval(None, None, "no verdict came back, so nothing can be said")
    if n == 1 or np.ptp(chance) == 0:
        p, z2 = float(chance[0]), 1.959964**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = math.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n))) / (1 + z2 / n)
        why = "one verdict" if n == 1 else f"all {n} verdicts are equal"
        low, high = max(0.0, centre - half) * 100, min(1.0, centre + half) * 100
        return Interval(low, high, f"{why}: the interval is Wilson's for a proportion")
    interval = bootstrap_mean(chance * 100, seed=seed)
    few = f"only {n} prompts: the interval is rough" if n < FEW_PROMPTS else ""
    return Interval(interval.low, interval.high, few)
