"""The models of one board against each other: ranks, groups, and the differences that the page shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from eval.board.figures import orders_image
from eval.board.numbers import count
from eval.outputs.matching import length_of, rows_of_prompts
from eval.stats.paired_differences import differences
from eval.stats.rank_groups import LEVEL, Comparisons, compare, ranks
from eval.stats.win_rate import by_prompt

RANK_COLUMNS = ("rank", "rank_worst", "group", "detectable_difference", "prompts_needed")
MISSING_COLUMNS = ("win_rate_if_missing_lost", "win_rate_if_missing_won")

MATRIX_SHOWN = 14

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Standings:
    """The m models of a board that have verdicts, best win rate first, on its n prompts.

    Attributes:
        names: (m,) of the models.
        chance: (m, n) probability in [0, 1] that the model wins; NaN where there is no verdict.
        length: (m, n) characters of the outputs; NaN where unknown.
        compared: every two of them.
    """

    names: list[str]
    chance: np.ndarray
    length: np.ndarray
    compared: Comparisons

    @property
    def missing(self) -> int:
        """Orders of two models that the verdicts would settle and the missing ones leave open."""
        return int(self.compared.withheld.sum()) // 2

    def pairs(self) -> pd.DataFrame:
        """Each model against the next one and against the best one, as `eval.stats.paired_differences` gives them.

        Returns:
            Its columns; p (of no difference), p_holm, settled (whether the order is claimed), and prompts_needed (to
            show the observed difference with 80 % power in one 5 % test).
        """
        m, found = len(self.names), self.compared
        chosen = [(0, 1)] if m > 1 else []
        for k in range(1, m):
            chosen += [(k, k + 1)] if k + 1 < m else []
            chosen += [(0, k)] if k > 1 else []
        table = differences(self.names, self.chance, self.length, chosen)
        i, j = np.array(chosen, dtype=int).reshape(-1, 2).T
        return table.assign(
            p=found.p[i, j],
            p_holm=found.p_holm[i, j],
            settled=(found.better | found.better.T)[i, j],
            prompts_needed=found.prompts_needed[i, j],
        )


def standings(verdicts: pd.DataFrame, outputs: Mapping[str, Rows] | None = None) -> Standings:
    """Compare the models of a table of verdicts.

    Two prompts are the same if their instruction and reference output are (by their hashes, if the table has them).

    Args:
        verdicts: one row a verdict, of one task and reference.
        outputs: model label -> rows of its model_outputs.json, for the lengths.

    Raises:
        UserError: a judged prompt has no row in its model's outputs.
    """
    if verdicts.empty:
        return Standings([], np.empty((0, 0)), np.empty((0, 0)), compare(np.empty((0, 0))))
    return standings_of(by_prompt(verdicts), list(dict.fromkeys(verdicts["generator"])), outputs)


def standings_of(prompts: pd.DataFrame, names: Sequence[str], outputs: Mapping[str, Rows] | None = None) -> Standings:
    """`standings`, of a table that `by_prompt` gave.

    Args:
        prompts: one row a model and prompt.
        names: of the models; of two with the same win rate, the earlier one stands first.
        outputs: see `standings`.
    """
    keys = [c for c in ("instruction_hash", "reference_hash") if c in prompts] or ["index"]
    occurrence = prompts.groupby(["generator", *keys], dropna=False).cumcount()
    place = prompts[keys].assign(occurrence=occurrence).groupby([*keys, "occurrence"], dropna=False).ngroup()
    who = pd.Series(range(len(names)), index=list(names))[prompts["generator"]].to_numpy()
    chance = np.full((len(names), int(place.max()) + 1), np.nan)
    asked, length = np.zeros(chance.shape, dtype=bool), np.full_like(chance, np.nan)
    chance[who, place] = prompts["preference"].to_numpy(float) - 1
    asked[who, place] = True
    for name, group in prompts.groupby("generator") if outputs else ():
        if rows := (outputs or {}).get(str(name)):
            own = rows_of_prompts(group["instruction"], rows, str(name))
            length[who[group.index], place[group.index]] = list(map(length_of, own))
    known = ~np.isnan(chance)
    rate = np.where(known, chance, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    order = np.argsort(-np.where(known.any(axis=1), rate, -1.0), kind="stable")
    order = order[known.any(axis=1)[order]]
    return Standings([names[i] for i in order], chance[order], length[order], compare(chance[order], asked[order]))


def pairs_of_models(verdicts: pd.DataFrame, outputs: Mapping[str, Rows] | None = None) -> pd.DataFrame:
    """`Standings.pairs` of a table of verdicts; arguments and errors are those of `standings`."""
    return standings(verdicts, outputs).pairs()


def with_ranks(table: pd.DataFrame, found: Standings) -> pd.DataFrame:
    """A leaderboard with RANK_COLUMNS of its models; they are empty where there are no verdicts."""
    best, worst, group = ranks(found.compared.better)
    below = [(k, k + 1) for k in range(len(found.names) - 1)]
    figures = pd.DataFrame(
        {
            "rank": pd.array(best, dtype="Int64"),
            "rank_worst": pd.array(worst, dtype="Int64"),
            "group": pd.array(group, dtype="Int64"),
            "detectable_difference": [*(found.compared.detectable[pair] for pair in below), np.nan][: len(best)],
            "prompts_needed": [*(found.compared.prompts_needed[pair] for pair in below), np.nan][: len(best)],
        },
        index=found.names,
    )
    rows = figures.reindex(table["name"]).set_axis(table.index)
    return table.assign(**{column: rows[column] for column in RANK_COLUMNS})


def matrix(found: Standings) -> dict[str, Any]:
    """The models against each other, as the page shows them: the first MATRIX_SHOWN as numbers, more as a picture.

    Returns:
        rows {name, cells}, with cells {points, kind} ("better", "worse", "open" or "self"); left_out; and picture (a
        data URI) with its words, both empty where all models are in the rows.
    """
    better, shown = found.compared.better, range(min(len(found.names), MATRIX_SHOWN))
    kinds = np.where(better, "better", np.where(better.T, "worse", "open"))
    np.fill_diagonal(kinds, "self")
    points = found.compared.difference
    rows = [
        {
            "name": found.names[i],
            "cells": [
                {"points": None if np.isnan(points[i, j]) else float(points[i, j]), "kind": str(kinds[i, j])}
                for j in shown
            ],
        }
        for i in shown
    ]
    m = len(found.names)
    if m <= MATRIX_SHOWN:
        return {"rows": rows, "left_out": "", "picture": "", "words": ""}
    told = int(better.sum())
    words = (
        f"All {m} models against each other, in the order of the table: a dark blue point where the row is shown to be "
        f"better, an orange one where it is worse, grey where the order is open. {told:,} of {m * (m - 1) // 2:,} "
        "orders are settled."
    )
    left_out = f" (the first {MATRIX_SHOWN} of {m} models)"
    return {"rows": rows, "left_out": left_out, "picture": orders_image(better), "words": words}


def with_bounds(table: pd.DataFrame) -> pd.DataFrame:
    """A leaderboard with MISSING_COLUMNS: the win rate if every missing verdict had been lost, or won."""
    judged, failed = table["n_total"].fillna(0).astype(float), table["n_failed"].fillna(0).astype(float)
    won = table["win_rate"].fillna(0.0).astype(float) * judged
    asked = (judged + failed).where(judged + failed > 0)
    bounds = zip(MISSING_COLUMNS, (won / asked, (won + 100 * failed) / asked), strict=True)
    return table.assign(**dict(bounds))


def groups_sentences(table: pd.DataFrame, found: Standings) -> list[str]:
    """What the groups of a board mean, and what missing verdicts leave open; empty for fewer than two models."""
    m = len(found.names)
    if m < 2 or table["group"].isna().all():
        return []
    groups = int(table["group"].max())
    if groups == m:
        said = f"All {m} models can be told apart."
    elif groups == 1:
        said = f"The {m} models make one group: no model is shown to be better than all that stand below it."
        if found.compared.better.any():
            said += " Some of them can still be told apart; the range of ranks says which places are possible."
    else:
        said = (
            f"The {m} models make {groups} groups; each model is shown to be better than every model of the groups "
            "below its own, and models that cannot be told apart share a group."
        )
    sentences = [f"{said} Of all orders that are claimed, the chance that any is wrong is at most {LEVEL:.0%} (Holm)."]
    if found.missing:
        orders = "one order of two models is" if found.missing == 1 else f"{found.missing:,} orders of two models are"
        sentences.append(
            f"{count(table['n_failed'].sum(), 'verdict')} missing: {orders} not claimed, and groups are merged, "
            "because the missing verdicts could have changed them."
        )
    return sentences
