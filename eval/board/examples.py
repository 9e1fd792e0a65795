"""Prompts with every answer and verdict side by side, and which of them the page shows."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from eval.board.run_files import Board
from eval.outputs import by_occurrence, occurrences
from eval.stats.win_rate import by_prompt


@dataclass(frozen=True)
class Answer:
    """One model's answer to a prompt and what the judge said of it."""

    name: str
    text: str | None
    chance: float | None  # that it wins, in [0, 1]; None where there is no verdict
    outcome: str  # "wins", "loses", "ties" or "no verdict"
    detail: str

    @property
    def length(self) -> int:
        """Characters."""
        return len(self.text or "")


@dataclass(frozen=True)
class Example:
    """One prompt; `reference` is None where the reference's answers are not in the run's folder."""

    number: int
    instruction: str
    reference: str | None
    answers: list[Answer]


def examples(board: Board) -> list[Example]:
    """Every judged prompt of a board, in order; several runs may have judged the same one."""
    if board.verdicts.empty:
        return []
    rows_of = {name: by_occurrence(rows) for name, rows in board.outputs.items()}
    reference = by_occurrence(board.reference_rows)
    errors: dict[tuple[str, int], list[str]] = {}
    if "error" in board.verdicts:
        failed = board.verdicts[board.verdicts["error"].notna()]
        for name, index, error in zip(failed["generator"], failed["index"], failed["error"], strict=True):
            errors.setdefault((name, index), []).append(str(error))
    prompts = by_prompt(board.verdicts)
    asked = occurrences(zip(prompts["generator"], prompts["instruction"], strict=True))
    prompts["occurrence"] = [n for _, n in asked]
    order = {name: i for i, name in enumerate(board.table["name"])}
    found: dict[tuple[str, int], list[Answer]] = {}
    for row in prompts.sort_values("index", kind="stable").to_dict("records"):
        key = (row["instruction"], row["occurrence"])
        output = rows_of.get(row["generator"], {}).get(key)
        found.setdefault(key, []).append(_answer(row, _text(output), errors.get((row["generator"], row["index"]), [])))
    return [
        Example(n, key[0], _text(reference.get(key)), sorted(answers, key=lambda a: order.get(a.name, len(order))))
        for n, (key, answers) in enumerate(found.items(), 1)
    ]


def _answer(row: Mapping[Any, Any], text: str | None, errors: list[str]) -> Answer:
    preference, flipped = row["preference"], row["flipped"]
    detail = "" if flipped is None else "the two orders disagree" if flipped else "the two orders agree"
    if pd.isna(preference):
        return Answer(
            row["generator"], text, None, "no verdict", ", ".join(sorted(set(errors))) or "cause not recorded"
        )
    outcome = "ties" if preference == 1.5 else "wins" if preference > 1.5 else "loses"
    return Answer(row["generator"], text, preference - 1, outcome, detail)


def _text(row: Mapping[str, Any] | None) -> str | None:
    return None if row is None else str(row["output"])


def sample(items: Sequence[Example], n: int) -> list[Example]:
    """At most `n` of them, drawn at random with a fixed seed: not picked for what they show."""
    if len(items) <= n:
        return list(items)
    return sorted(random.Random(0).sample(list(items), n), key=lambda item: item.number)


def failures(board: Board) -> list[dict[str, Any]]:
    """Verdicts that did not come, by model and type: rows {name, verdicts, failed, types}."""
    if board.verdicts.empty or "error" not in board.verdicts:
        return []
    rows = []
    for name in board.table["name"]:
        own = board.verdicts[board.verdicts["generator"] == name]
        missing = own[own["preference"].isna()]
        types = missing["error"].fillna("cause not recorded").astype(str).value_counts().to_dict()
        rows.append({"name": name, "verdicts": len(own), "failed": len(missing), "types": types})
    return rows
