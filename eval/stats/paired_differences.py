"""Paired differences: whether one model is better than another."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pandas as pd

from eval.stats.intervals import FEW_PROMPTS, bootstrap_mean

# z of a two-sided 5 % test plus z for 80 % power.
DETECTABLE_Z = 1.959964 + 0.841621


def paired_differences(verdicts: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Compare every two models on the prompts that both were judged on.

    Both met the same prompts and the same reference outputs, so prompts that are hard for both cancel out. The interval
    of the difference is therefore narrower than the two separate intervals suggest.

    Args:
        verdicts: columns name, prompt (any key), preference, and length (characters; the column or values may be
            missing).
        seed: of the bootstrap over prompts.

    Returns:
        A row for every two models, the better one first: better, other, difference (points of win rate), low, high, n
        (prompts), length_difference (mean characters, better minus other), detectable (the smallest difference that n
        such prompts show with 80 % power in a 5 % test) and note. A number that is not known is NaN.
    """
    chance = verdicts.pivot_table(index="prompt", columns="name", values="preference", aggfunc="mean", dropna=False) - 1
    length = verdicts.pivot_table(index="prompt", columns="name", values="length") if "length" in verdicts else None
    names = list(dict.fromkeys(verdicts["name"]))
    rows: list[dict[str, Any]] = []
    for a, b in itertools.combinations(names, 2):
        delta = (chance[a] - chance[b]).dropna() * 100
        if len(delta) and delta.mean() < 0:
            a, b, delta = b, a, -delta
        interval = bootstrap_mean(delta.to_numpy(), seed=seed)
        n = len(delta)
        note = interval.note and (f"the two got the same verdicts on all {n} prompts" if n else "no prompt in common")
        if n and interval.note and delta.iloc[0] != 0:
            note = f"the difference is the same on all {n} prompts" if n > 1 else "one prompt in common"
        gap = None
        if length is not None and a in length and b in length and n:
            both = (length[a] - length[b]).reindex(delta.index).dropna()
            gap = float(both.mean()) if len(both) else None
        rows.append(
            {
                "better": a,
                "other": b,
                "difference": float(delta.mean()) if n else None,
                "low": interval.low,
                "high": interval.high,
                "n": n,
                "length_difference": gap,
                "detectable": DETECTABLE_Z * float(delta.std(ddof=1)) / math.sqrt(n) if n > 1 else None,
                "note": note or (f"only {n} prompts: the interval is rough" if n < FEW_PROMPTS else ""),
            }
        )
    columns = ["better", "other", "difference", "low", "high", "n", "length_difference", "detectable", "note"]
    numbers = ["difference", "low", "high", "length_difference", "detectable"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(numbers, float))
