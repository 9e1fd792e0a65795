"""Paired differences: whether one model is better than another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from eval.stats.intervals import FEW_PROMPTS, HALF, mean_intervals

# z of a two-sided 5 % test plus z for 80 % power.
DETECTABLE_Z = 1.959964 + 0.841621
VALUES_AT_ONCE = 2**22


COLUMNS = ("better", "other", "difference", "low", "high", "n", "length_difference", "detectable", "note")


def paired_differences(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Compare every two models on the prompts that both were judged on.

    Both met the same prompts and the same reference outputs, so prompts that are hard for both cancel out. The interval
    of the difference is therefore narrower than the two separate intervals suggest.

    Args:
        verdicts: columns name, prompt (any key), preference, and length (characters; the column or values may be
            missing).

    Returns:
        A row for every two models, the better one first: better, other, difference (points of win rate), low, high, n
        (prompts), length_difference (mean characters, better minus other), detectable (the smallest difference that n
        such prompts show with 80 % power in a 5 % test) and note. A number that is not known is NaN.
    """
    names = list(dict.fromkeys(verdicts["name"]))
    if len(names) < 2:
        return differences(names, np.empty((len(names), 0)), None, [])
    chance = _by_name(verdicts, "preference", names) - 1
    length = _by_name(verdicts, "length", names) if "length" in verdicts else None
    return differences(names, chance, length, list(itertools.combinations(range(len(names)), 2)))


def differences(
    names: Sequence[str], chance: np.ndarray, length: np.ndarray | None, pairs: Sequence[tuple[int, int]]
) -> pd.DataFrame:
    """`paired_differences` of chosen pairs of m models.

    Args:
        names: (m,) of the models.
        chance: (m, n) probability in [0, 1] that the model wins on the prompt; NaN where there is no verdict.
        length: (m, n) characters; NaN where unknown, None if all are.
        pairs: positions among the models.
    """
    if not len(pairs):
        return pd.DataFrame(columns=list(COLUMNS)).astype(dict.fromkeys(COLUMNS[2:8], float))
    chosen, percent = np.array(pairs), 100 * chance
    lengths = np.full_like(percent, np.nan) if length is None else length
    step = max(1, VALUES_AT_ONCE // max(chance.shape[1], 1))
    parts = [_differences(percent, lengths, chosen[start : start + step]) for start in range(0, len(chosen), step)]
    table = pd.concat(parts, ignore_index=True)
    table["better"], table["other"] = (np.array(names, dtype=object)[table[side]] for side in ("better", "other"))
    return table[list(COLUMNS)]


def _by_name(verdicts: pd.DataFrame, column: str, names: list[str]) -> np.ndarray:
    """(models, prompts) the mean of a column; NaN where there is none."""
    table = verdicts.pivot_table(index="name", columns="prompt", values=column, aggfunc="mean", dropna=False)
    return table.reindex(index=names, columns=sorted(set(verdicts["prompt"]), key=str)).to_numpy(float)


def _differences(chance: np.ndarray, length: np.ndarray, pairs: np.ndarray) -> pd.DataFrame:
    """Rows of `paired_differences` with positions in place of names.

    Args:
        chance: (models, prompts) win rates in percent. length: (models, prompts) characters. pairs: (p, 2) positions.
    """
    delta = chance[pairs[:, 0]] - chance[pairs[:, 1]]
    both = ~np.isnan(delta)
    n = both.sum(axis=1)
    mean = _mean(delta, both)
    swapped = mean < 0
    pairs, sign = np.where(swapped[:, None], pairs[:, ::-1], pairs), np.where(swapped, -1.0, 1.0)[:, None]
    delta, mean = delta * sign, np.abs(mean)
    low, high = mean_intervals(delta, (-100.0, 100.0), HALF)
    longer = np.where(both, (length[pairs[:, 0]] - length[pairs[:, 1]]), np.nan)
    spread = np.sqrt(((delta - mean[:, None]) ** 2).sum(axis=1, where=both) / np.where(n > 1, n - 1, np.nan))
    return pd.DataFrame(
        {
            "better": pairs[:, 0],
            "other": pairs[:, 1],
            "difference": mean,
            "low": low,
            "high": high,
            "n": n,
            "length_difference": _mean(longer, ~np.isnan(longer)),
            "detectable": DETECTABLE_Z * spread / np.sqrt(n),
            "note": [_note(count, row[known]) for count, row, known in zip(n.tolist(), delta, both, strict=True)],
        }
    )


def _mean(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    counts = known.sum(axis=1)
    return values.sum(axis=1, where=known) / np.where(counts > 0, counts, np.nan)


def _note(n: int, delta: np.ndarray) -> str:
    if n == 0:
        return "no prompt in common"
    if np.ptp(delta) == 0:
        if delta[0] == 0:
            return f"the two got the same verdicts on all {n} prompts"
        return f"the difference is the same on all {n} prompts" if n > 1 else "one prompt in common"
    return f"only {n} prompts: the interval is rough" if n < FEW_PROMPTS else ""
