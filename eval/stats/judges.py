"""Two judges of the same outputs: how far they agree, and what changes on the board if one takes the other's place."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from eval.stats.agreement import grouped_kappa, grouped_mean
from eval.stats.intervals import mean_intervals
from eval.stats.win_rate import by_prompt

DRAW = 1.5


def winners_of(verdicts: pd.DataFrame) -> pd.Series:
    """The winner of each prompt, 1 (the reference), 2 or 1.5, by generator and index; NaN where there is no verdict."""
    prompts = by_prompt(verdicts)
    winner = DRAW + 0.5 * np.sign(prompts["preference"].to_numpy(float) - DRAW)
    return pd.Series(winner, index=pd.MultiIndex.from_frame(prompts[["generator", "index"]]))


def judges_agreement(one: pd.DataFrame, other: pd.DataFrame) -> dict[str, Any]:
    """How often two judges name the same winner of a prompt.

    Args:
        one: verdicts of a judge (columns of `eval.judge.table`).
        other: another's, on the same outputs.

    Returns:
        n (prompts, of any model, with a verdict of both), agreement (the share with the same winner, a draw being an
        answer like others) and kappa (Cohen's: beyond chance), fractions with the 95 % interval over prompts of each as
        NAME_low and NAME_high; None where nothing can be said.
    """
    pair = pd.concat([winners_of(one), winners_of(other)], axis=1, keys=["one", "other"]).dropna()
    groups = pair.index.get_level_values("index").to_numpy(int)
    same = (pair["one"] == pair["other"]).to_numpy(float)
    return {
        "n": len(pair),
        **grouped_mean("agreement", same, groups),
        **grouped_kappa("kappa", pair.to_numpy(float).T, groups),
    }


def panel_agreement(members: Mapping[str, pd.DataFrame], panel: pd.DataFrame) -> dict[str, Any]:
    """Each judge of a panel with each other, and with the panel's own verdicts.

    Args:
        members: judge -> its verdicts.
        panel: the panel's verdicts.

    Returns:
        judges, a list of {judge, n, agreement, kappa, ...} with the panel; and pairs, a list of {judge, other, ...}.
    """
    return {
        "judges": [{"judge": name, **judges_agreement(own, panel)} for name, own in members.items()],
        "pairs": [
            {"judge": one, "other": other, **judges_agreement(members[one], members[other])}
            for one, other in combinations(members, 2)
        ],
    }


def migration(old: pd.DataFrame, new: pd.DataFrame) -> dict[str, Any]:
    """What a new judge changes on a board of the same outputs.

    Args:
        old: verdicts of the judge that was asked before.
        new: the new judge's.

    Returns:
        The figures of `judges_agreement`; models, in the order of the new win rate, a list of {name, n, old_win_rate,
        new_win_rate (percent, of the prompts that have a verdict of both), difference (points) with its 95 % interval
        low and high (paired by prompt), old_rank, new_rank, agreement, kappa}; kendall_tau and spearman of the models'
        win rates (None below three models); and moved (models whose rank differs).
    """
    chance = pd.concat(
        [by_prompt(side).set_index(["generator", "index"])["preference"] - 1 for side in (old, new)],
        axis=1, keys=["old", "new"],
    ).dropna()  # fmt: skip
    rows = [_model(str(name), 100 * own, old, new) for name, own in chance.groupby(level="generator", sort=False)]
    for side in ("old", "new"):
        rates = _rates(rows, side)
        for row, own in zip(rows, rates, strict=True):
            row[f"{side}_rank"] = 1 + sum(each > own for each in rates)
    rows.sort(key=lambda row: row["new_rank"])
    return {
        **judges_agreement(old, new),
        **_order(rows),
        "moved": sum(row["old_rank"] != row["new_rank"] for row in rows),
        "models": rows,
    }


def _model(name: str, points: pd.DataFrame, old: pd.DataFrame, new: pd.DataFrame) -> dict[str, Any]:
    moved = (points["new"] - points["old"]).to_numpy(float)
    low, high = mean_intervals(moved, (-100.0, 100.0))
    both = judges_agreement(*(side[side["generator"] == name] for side in (old, new)))
    return {
        "name": name,
        "n": len(points),
        "old_win_rate": float(points["old"].mean()),
        "new_win_rate": float(points["new"].mean()),
        "difference": float(moved.mean()),
        "low": float(low[0]),
        "high": float(high[0]),
        "agreement": both["agreement"],
        "kappa": both["kappa"],
    }


def _rates(rows: list[dict[str, Any]], side: str) -> list[float]:
    """Win rates without their last digits, which depend on the order of the verdicts: equal ones are equal."""
    return [round(row[f"{side}_win_rate"], 9) for row in rows]


def _order(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """How far the two orders of the models agree."""
    from scipy.stats import kendalltau, spearmanr

    rates = [_rates(rows, side) for side in ("old", "new")]
    if len(rows) < 3:
        return {"kendall_tau": None, "spearman": None}
    found = (kendalltau(*rates).statistic, spearmanr(*rates).statistic)
    tau, rho = (None if np.isnan(value) else float(value) for value in found)
    return {"kendall_tau": tau, "spearman": rho}
