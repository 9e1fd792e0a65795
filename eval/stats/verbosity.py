"""Verbosity: how long a model's outputs are, and whether it wins by being longer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from eval.stats.win_rate import valid_preferences


def verbosity(
    preference: npt.ArrayLike,
    lengths: npt.ArrayLike,
    reference_lengths: npt.ArrayLike,
    tokens: Sequence[float | None] | None = None,
    truncated: Sequence[bool | None] | None = None,
) -> dict[str, float | None]:
    """How long a model's outputs are, and how winning goes together with length.

    Args:
        preference: (n,) preferences, NaN allowed.
        lengths: (n,) characters of the model's outputs.
        reference_lengths: (n,) characters of the reference's outputs.
        tokens: (n,) generated tokens; None where unknown.
        truncated: (n,) whether the output was cut at the token limit; None where unknown.

    Returns:
        avg_length and reference_length (mean characters, rounded down), length_ratio (model over reference),
        avg_tokens; and percentages: longer_share (outputs longer than the reference's), wins_when_longer (wins whose
        output is longer), win_rate_when_longer, win_rate_when_shorter, truncation_rate. None where nothing is known.
    """
    chance = valid_preferences(preference) - 1
    mine, theirs = np.asarray(lengths, dtype=float), np.asarray(reference_lengths, dtype=float)
    judged = ~np.isnan(chance)
    longer, shorter = mine > theirs, mine < theirs
    wins = judged & (chance > 0.5)
    known_tokens = [t for t in tokens or [] if t is not None and not pd.isna(t)]
    known_cuts = [bool(t) for t in truncated or [] if t is not None and not pd.isna(t)]

    def percent(values: np.ndarray) -> float | None:
        return float(values.mean() * 100) if len(values) else None

    return {
        "avg_length": int(mine.mean()) if len(mine) else None,
        "reference_length": int(theirs.mean()) if len(theirs) else None,
        "length_ratio": float(mine.mean() / theirs.mean()) if len(mine) and theirs.mean() > 0 else None,
        "avg_tokens": float(np.mean(known_tokens)) if known_tokens else None,
        "longer_share": percent(longer),
        "wins_when_longer": percent(longer[wins]),
        "win_rate_when_longer": percent(chance[judged & longer]),
        "win_rate_when_shorter": percent(chance[judged & shorter]),
        "truncation_rate": float(np.mean(known_cuts) * 100) if known_cuts else None,
    }


def gain_from_length(
    win_rate: float | None, at_equal_length: float | None, interval: tuple[float | None, float | None]
) -> float | None:
    """How much of a win rate's distance from 50 % goes away at equal length, in percent.

    100 is all of it: the model wins, or loses, by length alone. Below 0, it wins although its length speaks against it.

    Args:
        win_rate: in percent.
        at_equal_length: the length-controlled or length-adjusted win rate.
        interval: of the win rate.

    Returns:
        None where one of the two is not known, or 50 % is inside the interval: there is no gain to be shared.
    """
    low, high = interval
    if win_rate is None or at_equal_length is None or low is None or high is None:
        return None
    if pd.isna(win_rate) or pd.isna(at_equal_length) or low <= 50.0 <= high:
        return None
    return 100.0 * (win_rate - at_equal_length) / (win_rate - 50.0)
