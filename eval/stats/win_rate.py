"""How good, how sure and how long: win rates, intervals, paired differences, verbosity.

A preference is a float in [1, 2] (AlpacaEval's convention: output 1 is the reference, output 2 the model), so that
`preference - 1` is the probability that the model wins. Every rate and share here is a percentage, like `win_rate`.
Prompts are what is resampled: both orders of one prompt are averaged first, so that they are not counted as two.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

CONFIDENCE = 0.95
RESAMPLES = 2000
FEW_PROMPTS = 30
# z for a two-sided 5 % test plus z for 80 % power.
DETECTABLE_Z = 1.959964 + 0.841621


@dataclass(frozen=True)
class Interval:
    """A 95 % interval in the units of its estimate; both ends None where none can be given, and `note` says why."""

    low: float | None
    high: float | None
    note: str = ""


def valid_preferences(preference: npt.ArrayLike) -> np.ndarray:
    """Preferences as (n,) floats in [1, 2]; what is no preference becomes NaN, and AlpacaEval's old draw 0 is 1.5."""
    values = np.asarray(pd.to_numeric(pd.Series(preference, dtype=object), errors="coerce"), dtype=float)
    values = np.where(values == 0, 1.5, values)
    with np.errstate(invalid="ignore"):
        return np.where((values >= 1) & (values <= 2), values, np.nan)


def win_rates(preference: npt.ArrayLike) -> dict[str, float]:
    """AlpacaEval's win rate of one model, exactly as `alpaca_eval.metrics.get_winrate` computes it.

    Args:
        preference: (n,) preferences; NaN where the judge gave no verdict. Those leave `n_total`.

    Returns:
        win_rate (100 x mean of preference - 1), standard_error (ddof 1; NaN for one verdict), n_wins, n_wins_base,
        n_draws (exactly 1.5), n_total and discrete_win_rate (each preference rounded, a draw counted as half).
    """
    values = valid_preferences(preference)
    values = values[~np.isnan(values)]
    n = len(values)
    chance = values - 1
    discrete = np.where(values == 1.5, 0.5, np.round(chance))
    return {
        "win_rate": float(chance.mean() * 100) if n else math.nan,
        "standard_error": float(chance.std(ddof=1) / math.sqrt(n) * 100) if n > 1 else math.nan,
        "n_wins": int((chance > 0.5).sum()),
        "n_wins_base": int((chance < 0.5).sum()),
        "n_draws": int((values == 1.5).sum()),
        "n_total": n,
        "discrete_win_rate": float(discrete.mean() * 100) if n else math.nan,
    }


def bootstrap_mean(values: npt.ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Bias-corrected, accelerated bootstrap interval of a mean (scipy.stats.bootstrap), seeded.

    Args:
        values: (n,) one value a prompt; NaN are left out.
        seed: of the resampling; the same values and seed give the same interval.
        resamples: how many resamples.
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

    A bootstrap of verdicts that are all equal has no width, which would claim certainty after three prompts. There
    Wilson's score interval for a proportion is given instead: for values in [0, 1] it is never too narrow, because
    their variance is at most p (1 - p).
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


def by_prompt(verdicts: pd.DataFrame) -> pd.DataFrame:
    """One row a model and prompt from one row a verdict.

    Where a prompt was asked in both orders its preference is their mean, and missing if either failed: one order
    alone would bring back the position bias that the two remove.

    Args:
        verdicts: columns generator, index, preference; also instruction, instruction_hash, reference_hash, order.

    Returns:
        Columns generator, index, preference, flipped (True when the two orders name different winners, None where
        there is one order) and those of instruction, instruction_hash, reference_hash that were given; sorted.
    """
    kept = [c for c in ("instruction", "instruction_hash", "reference_hash") if c in verdicts]
    keys = ["generator", "index"]
    frame = verdicts[[*keys, *kept]].assign(preference=valid_preferences(verdicts["preference"]))
    frame["winner"], frame["failed"] = np.sign(frame["preference"] - 1.5), frame["preference"].isna()
    groups = frame.groupby(keys, sort=True)
    rows = groups[kept].first() if kept else pd.DataFrame(index=groups.size().index)
    failed = groups["failed"].any()
    rows.insert(0, "preference", groups["preference"].mean().where(~failed))
    flipped = (groups["winner"].nunique() > 1).astype(object)
    rows.insert(1, "flipped", flipped.where((groups.size() > 1) & ~failed, None))
    return rows.reset_index()


def verbosity(
    preference: npt.ArrayLike,
    lengths: npt.ArrayLike,
    reference_lengths: npt.ArrayLike,
    tokens: Sequence[float | None] | None = None,
    truncated: Sequence[bool | None] | None = None,
) -> dict[str, float | None]:
    """How long the answers are, and how far winning goes with being longer.

    Args:
        preference: (n,) preferences, NaN allowed.
        lengths: (n,) characters of the model's answers.
        reference_lengths: (n,) characters of the reference's answers.
        tokens: (n,) generated tokens, where known.
        truncated: (n,) whether the answer was cut at the token limit, where known.
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


def paired_differences(table: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """Every two models against each other on the prompts both were judged on.

    The same prompts and the same reference answers make a pair, so what is hard for both cancels out: the interval
    is narrower than two separate ones suggest.

    Args:
        table: columns name, prompt (any key), preference, and length (characters; may be missing or NaN).
        seed: of the bootstrap over prompts.

    Returns:
        A row a pair, the better model first: better, other, difference (points of win rate), low, high, n,
        length_difference (mean characters, better minus other), detectable (the smallest difference that n such
        prompts show with 80 % power in a 5 % test) and note.
    """
    chance = table.pivot_table(index="prompt", columns="name", values="preference", aggfunc="mean", dropna=False) - 1
    length = table.pivot_table(index="prompt", columns="name", values="length") if "length" in table else None
    names = list(dict.fromkeys(table["name"]))
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
    return pd.DataFrame(rows, columns=columns)
