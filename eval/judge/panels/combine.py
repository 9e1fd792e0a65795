"""The verdicts of a panel: what its judges say of each question, as one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import pandas as pd

from eval.judge.table import COLUMNS
from eval.stats.win_rate import valid_preferences

SUMMED = ("attempts", "prompt_tokens", "completion_tokens", "price_usd", "seconds")


def combined(members: Mapping[str, pd.DataFrame], vote: Literal["mean", "majority"]) -> pd.DataFrame:
    """One table of verdicts from those of several judges on the same questions.

    A preference is the mean of the judges', or with "majority" that of the winner which most of them name, a draw where
    no winner has more. Where a judge gives no verdict the panel gives none: the questions that the others answer may be
    those that are easy to tell. A single output's score is the mean of the judges'.

    Args:
        members: judge -> its verdicts; all tables have the same rows in the same order.
        vote: how a verdict is made of several.

    Returns:
        Columns as `eval.judge.table.COLUMNS`. `raw` holds each judge's preference and `judge_model` what each answers
        as, `read` is "panel", and attempts, tokens, price and seconds are those of all judges together.
    """
    tables = list(members.values())
    first = tables[0].reset_index(drop=True)
    said = np.stack([valid_preferences(table["preference"]) for table in tables])
    votes = said if vote == "mean" else 1.5 + 0.5 * np.sign(said - 1.5)
    preference = votes.mean(axis=0)
    if vote == "majority":
        preference = 1.5 + 0.5 * np.sign(preference - 1.5)
    frame = first.assign(preference=preference, read="panel", weight=np.mean([t["weight"] for t in tables], axis=0))
    asked = first["key"] != ""
    frame["read"] = frame["read"].where(asked & ~np.isnan(preference), first["read"].where(~asked))
    frame["raw"] = [
        json.dumps({name: None if math.isnan(p) else p for name, p in zip(members, column, strict=True)})
        for column in said.T
    ]
    for column in SUMMED:
        frame[column] = sum(table[column].to_numpy() for table in tables)
    frame["cached"] = np.logical_and.reduce([table["cached"].to_numpy(bool) for table in tables])
    for column in ("score", "reference_score"):
        frame[column] = np.mean([table[column].to_numpy(float) for table in tables], axis=0)
    for column in ("said", "error", "detail"):
        frame[column] = _joined(members, column)
    frame["judge_model"] = [json.dumps(cells) if cells else None for cells in _cells(members, "judge_model")]
    if frame["score"].notna().any():  # what is said of criteria is each judge's own
        frame["said"] = None
    return frame[list(COLUMNS)].astype(COLUMNS)


def _cells(members: Mapping[str, pd.DataFrame], column: str) -> list[dict[str, str]]:
    """Judge -> what its table says in a column, for those that say something; an entry a row."""
    rows = zip(*(table[column] for table in members.values()), strict=True)
    return [{name: cell for name, cell in zip(members, row, strict=True) if isinstance(cell, str)} for row in rows]


def _joined(members: Mapping[str, pd.DataFrame], column: str) -> list[str | None]:
    """What the judges that have a value say, with their names; of an error the first judge's."""
    rows = _cells(members, column)
    if column == "error":
        return [next(iter(row.values()), None) for row in rows]
    return ["; ".join(f"{name}: {cell}" for name, cell in row.items()) or None for row in rows]
