"""Prompts with every output and verdict side by side, and which of them the page shows."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from eval.board.run_files import Board
from eval.judge.replies import words_of
from eval.outputs.matching import by_occurrence, occurrences
from eval.stats.win_rate import by_prompt

WORDS_SHOWN = 5
_VERDICT_ALONE = re.compile(r"\W*\w?\W*|\{\s*\"\w+\"\s*:\s*\"?\w+\"?\s*\}")  # a letter, or JSON with one value
_SHOWN_FIRST = {"reference_first": "The reference was shown first.", "model_first": "The model was shown first."}


@dataclass(frozen=True)
class ShownOutput:
    """One model's output for a prompt and the verdict on it.

    Attributes:
        name: the model's.
        text: the output; None if it is not in the run's folder.
        chance: probability in [0, 1] that it beats the reference's output; None if there is no verdict.
        outcome: "wins", "loses", "ties" or "no verdict".
        flipped: whether the two orders disagree; None where one was asked.
        cause: why there is no verdict; empty where there is one.
        said: the judge's words, where they are more than the name of an output; may be empty.
    """

    name: str
    text: str | None
    chance: float | None
    outcome: str
    flipped: bool | None
    cause: str
    said: str

    @property
    def length(self) -> int:
        """Characters."""
        return len(self.text or "")


@dataclass(frozen=True)
class Example:
    """One prompt with all its outputs; `reference` is None if the reference's are not in the run's folder."""

    number: int
    instruction: str
    reference: str | None
    outputs: list[ShownOutput]


def examples(board: Board) -> list[Example]:
    """Every judged prompt of a board, in order. A prompt that several runs judged is one example."""
    if board.verdicts.empty:
        return []
    rows_of = {name: by_occurrence(rows) for name, rows in board.outputs.items()}
    reference = by_occurrence(board.reference_rows)
    errors: dict[tuple[str, int], list[str]] = {}
    if "error" in board.verdicts:
        failed = board.verdicts[board.verdicts["error"].notna()]
        for name, index, error in zip(failed["generator"], failed["index"], failed["error"], strict=True):
            errors.setdefault((name, index), []).append(str(error))
    said = _said(board.verdicts)
    prompts = by_prompt(board.verdicts)
    judged = occurrences(zip(prompts["generator"], prompts["instruction"], strict=True))
    prompts["occurrence"] = [n for _, n in judged]
    rank = {name: i for i, name in enumerate(board.table["name"])}
    found: dict[tuple[str, int], list[ShownOutput]] = {}
    for row in prompts.sort_values("index", kind="stable").to_dict("records"):
        key, name = (row["instruction"], row["occurrence"]), row["generator"]
        text = _text(rows_of.get(name, {}).get(key))
        words = "\n\n".join(said.get((name, row["index"]), []))
        found.setdefault(key, []).append(_shown(row, text, errors.get((name, row["index"]), []), words))
    return [
        Example(
            number,
            instruction=key[0],
            reference=_text(reference.get(key)),
            outputs=sorted(outputs, key=lambda output: rank.get(output.name, len(rank))),
        )
        for number, (key, outputs) in enumerate(found.items(), 1)
    ]


def _said(verdicts: pd.DataFrame) -> dict[tuple[str, int], list[str]]:
    """(model, number of the prompt) -> what the judge wrote, an entry a reply; verdicts without a word are left out."""
    found: dict[tuple[str, int], list[str]] = {}
    if "raw" in verdicts:
        kept = verdicts[verdicts["raw"].notna()]
        for name, index, order, raw in zip(kept["generator"], kept["index"], kept["order"], kept["raw"], strict=True):
            for words in words_of(str(raw)):
                if not _VERDICT_ALONE.fullmatch(words):
                    place = _SHOWN_FIRST.get(order)
                    found.setdefault((name, index), []).append(f"{place}\n{words}" if place else words)
    return found


def _shown(row: Mapping[Any, Any], text: str | None, errors: list[str], said: str) -> ShownOutput:
    name, preference, flipped = row["generator"], row["preference"], row["flipped"]
    if pd.isna(preference):
        cause = ", ".join(sorted(set(errors))) or "cause not recorded"
        return ShownOutput(name, text, None, "no verdict", None, cause, said)
    outcome = "ties" if preference == 1.5 else "wins" if preference > 1.5 else "loses"
    return ShownOutput(name, text, preference - 1, outcome, flipped, "", said)


def _text(row: Mapping[str, Any] | None) -> str | None:
    return None if row is None or row["output"] is None else str(row["output"])


def sample(items: Sequence[Example], n: int) -> list[Example]:
    """At most `n` examples, drawn at random with a fixed seed so that nobody picks them."""
    if len(items) <= n:
        return list(items)
    return sorted(random.Random(0).sample(list(items), n), key=lambda item: item.number)


def failures(board: Board) -> list[dict[str, Any]]:
    """Missing verdicts by model and kind of failure: rows {name, verdicts, failed, types, words}.

    `words` are (kind, what the endpoint or the judge said, how often), the most frequent first.
    """
    if board.verdicts.empty or "error" not in board.verdicts:
        return []
    rows, of_model = [], dict(list(board.verdicts.groupby("generator", sort=False)))
    for name in board.table["name"]:
        own = of_model.get(name, board.verdicts.head(0))
        missing = own[own["preference"].isna()]
        types = missing["error"].fillna("cause not recorded").astype(str).value_counts().to_dict()
        said: Any = missing[["error", "detail"]].dropna().value_counts() if "detail" in missing else {}
        words = [(kind, detail, int(count)) for (kind, detail), count in list(said.items())[:WORDS_SHOWN]]
        rows.append({"name": name, "verdicts": len(own), "failed": len(missing), "types": types, "words": words})
    return rows
