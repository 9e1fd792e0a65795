"""Win rates: how good a model is.

A preference is a float in [1, 2] (AlpacaEval's convention: output 1 is the reference's, output 2 the model's), so
`preference - 1` is the probability that the model wins. All rates and shares are percentages.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pandas as pd


def valid_preferences(preference: npt.ArrayLike) -> np.ndarray:
    """Preferences as (n,) floats in [1, 2]. Anything else becomes NaN; only 0, AlpacaEval's old draw, becomes 1.5."""
    values = np.asarray(pd.to_numeric(pd.Series(preference, dtype=object), errors="coerce"), dtype=float)
    values = np.where(values == 0, 1.5, values)
    with np.errstate(invalid="ignore"):
        return np.where((values >= 1) & (values <= 2), values, np.nan)


def win_rates(preference: npt.ArrayLike) -> dict[str, float]:
    """AlpacaEval's win rate of one model, exactly as `alpaca_eval.metrics.get_winrate` computes it.

    Args:
        preference: (n,) preferences; NaN where the judge gave no verdict. NaN do not count in `n_total`.

    Returns:
        win_rate (100 x mean of preference - 1), standard_error (ddof 1; NaN for one verdict), n_wins, n_wins_base,
        n_draws (exactly 1.5), n_total and discrete_win_rate (each preference rounded, a draw counts as half a win).
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


def by_prompt(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Turn a table with one row a verdict into one with one row a model and prompt.

    The preference for a prompt that was asked in both orders is the mean of the two. It is missing if either order
    failed: one order alone would bring back the position bias that asking in both removes. Where `combine` is "agreed",
    two orders that do not name the same winner are a draw, as in MT-Bench.

    Args:
        verdicts: columns generator, index, preference; also instruction, instruction_hash, reference_hash, combine.

    Returns:
        Columns generator, index, preference, flipped (whether the two orders name different winners; None if there is
        one order only) and those of instruction, instruction_hash, reference_hash that were given. Sorted by generator
        and index.
    """
    kept = [c for c in ("instruction", "instruction_hash", "reference_hash") if c in verdicts]
    keys = ["generator", "index"]
    frame = verdicts[[*keys, *kept]].assign(preference=valid_preferences(verdicts["preference"]))
    frame["winner"], frame["failed"] = np.sign(frame["preference"] - 1.5), frame["preference"].isna()
    groups = frame.groupby(keys, sort=True)
    rows = groups[kept].first() if kept else pd.DataFrame(index=groups.size().index)
    failed = groups["failed"].any()
    rows.insert(0, "preference", groups["preference"].mean().where(~failed))
    differ = groups["winner"].nunique() > 1
    if "combine" in verdicts:
        agreed = verdicts["combine"].eq("agreed").groupby([verdicts[key] for key in keys], sort=True).any()
        rows["preference"] = rows["preference"].mask(agreed & differ & ~failed, 1.5)
    flipped = differ.astype(object)
    rows.insert(1, "flipped", flipped.where((groups.size() > 1) & ~failed, None))
    return rows.reset_index()
