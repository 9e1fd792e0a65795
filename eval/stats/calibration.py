"""Whether a judge is as often right as it is sure: its probabilities beside people's labels.

A verdict of 1.8 says that output_2 is better with probability .8. Of a calibrated judge's verdicts with .8, people
agree with 80 %. A board's win rate is a mean of such probabilities, so an overconfident judge makes it too extreme.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import brentq
from scipy.special import expit, logit

from eval.stats.agreement import grouped_mean, majority
from eval.stats.win_rate import valid_preferences

BINS = 10  # of confidence, from .5 to 1
NEAREST = 1e-6  # a probability of 0 or 1 has no odds
WIDEST = 20.0  # the temperature is looked for between its inverse and this


def calibration(
    first_order: npt.ArrayLike,
    second_order: npt.ArrayLike,
    labels: Sequence[Sequence[int]],
    instructions: Sequence[str],
) -> dict[str, Any]:
    """How a judge's probabilities fit people's labels, over the verdicts of both orders.

    Args:
        first_order: (p,) preferences in [1, 2], shown output_1 first; NaN where there is none.
        second_order: (p,) the same, shown output_2 first.
        labels: p times one or more labels: 1 or 2 for the better output, 0 for a tie.
        instructions: (p,) what the outputs of each pair answer; intervals are over them.

    Returns:
        confidence (mean probability of the output that is named) and right (how often people name it too, a verdict
        for neither being half right); brier (mean squared distance of the probability from the label, Brier 1950);
        each of the three with NAME_low and NAME_high.
        calibration_error: mean distance of confidence and right in ten bins of confidence, by their verdicts (Guo et
        al. 2017, arXiv:1706.04599).
        temperature: what the log-odds have to be divided by to fit the labels best (the same source): above 1 is
        overconfident. None where the judge gives whole verdicts alone, or no finite number fits best.
        bins: {low, high, n, confidence, right, right_low, right_high} of each bin that has verdicts.
        All None, and no bins, where people name no winner of a pair with a verdict.
    """
    gold = np.array([majority(each) for each in labels], dtype=int)
    groups = pd.factorize(np.asarray(instructions, dtype=object))[0]
    chance = np.concatenate([valid_preferences(order) - 1 for order in (first_order, second_order)])
    better = np.tile(gold, 2) - 1.0  # 1: people prefer output_2
    group = np.tile(groups, 2)
    used = np.tile(gold > 0, 2) & ~np.isnan(chance)
    chance, better, group = chance[used], better[used], group[used]
    sure = np.maximum(chance, 1 - chance)
    right = np.where(chance == 0.5, 0.5, (chance > 0.5) == better)
    bins = _bins(sure, right, group)
    gaps = [each["n"] * abs(each["confidence"] - each["right"]) for each in bins]
    return {
        **grouped_mean("confidence", sure, group),
        **grouped_mean("right", right, group),
        **grouped_mean("brier", (chance - better) ** 2, group),
        "calibration_error": sum(gaps) / len(sure) if len(sure) else None,
        "temperature": _temperature(chance, better),
        "bins": bins,
    }


def _bins(sure: np.ndarray, right: np.ndarray, group: np.ndarray) -> list[dict[str, Any]]:
    edges = np.linspace(0.5, 1, BINS + 1)
    number = np.minimum(np.searchsorted(edges, sure, side="right") - 1, BINS - 1)
    return [
        {
            "low": float(edges[i]),
            "high": float(edges[i + 1]),
            "n": int((number == i).sum()),
            "confidence": float(sure[number == i].mean()),
            **grouped_mean("right", right[number == i], group[number == i]),
        }
        for i in range(BINS)
        if (number == i).any()
    ]


def _temperature(chance: np.ndarray, better: np.ndarray) -> float | None:
    if np.isin(chance, (0.0, 0.5, 1.0)).all():
        return None
    # How far each verdict's log-odds speak for what people say. The likelihood's slope by sharpness (the inverse of the
    # temperature) falls. Its root is sought: the likelihood itself is flat to rounding where verdicts are sure.
    right = np.where(better == 1, 1.0, -1.0) * logit(np.clip(chance, NEAREST, 1 - NEAREST))

    def slope(log_temperature: float) -> float:
        sharpness = np.exp(-log_temperature)
        return float(np.mean(right * expit(-right * sharpness)))

    bound = np.log(WIDEST) - 1e-3
    if not slope(bound) > 0 > slope(-bound):
        return None
    return float(np.exp(brentq(slope, -bound, bound)))
