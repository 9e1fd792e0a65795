"""Pairs of outputs that people compared: what `otpo agreement` asks the judge about.

Read as they are: LLMBar's dataset.json, PandaLM's test set, RewardBench's rows, and rows of one's own,
{instruction, output_1, output_2, label or labels}.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.judge.verdicts import model_first
from eval.outputs.reading import whole_text
from eval.tasks import prompt_in
from otpo.data.rows import BadRow
from otpo.errors import UserError
from otpo.files import Row, read_rows

TIE = 0
_LABELS = {"0": TIE, "tie": TIE, "1": 1, "2": 2, "0.0": TIE, "1.0": 1, "2.0": 2}
_OUTPUTS = (("output_1", "output_2"), ("response1", "response2"), ("chosen", "rejected"))
_ANNOTATOR = re.compile(r"annotator_?\d+")


@dataclass(frozen=True)
class LabelledPair:
    """Two outputs for an instruction, and which of them people prefer.

    Attributes:
        instruction: what was asked.
        output_1: an output.
        output_2: the other one.
        labels: one a person: 1 or 2 for the better output, 0 for a tie.
        category: what part of the data the pair belongs to.
    """

    instruction: str
    output_1: str
    output_2: str
    labels: tuple[int, ...]
    category: str


def load_pairs(files: Sequence[Path], seed: int = 0) -> list[LabelledPair]:
    """Read files of labelled pairs.

    A category is a row's `category` or `subset`, otherwise its file's name, or its folder's where names are the same.

    Args:
        seed: of which output of a chosen and a rejected one is output_1, drawn from it and the instruction. Were the
            better output always the same one, agreement between the two orders by chance would be nearly whole.

    Raises:
        UserError: a file that cannot be read, or a row without an instruction, two outputs or a label; the message
            counts the rows by reason.
    """
    pairs = []
    for file, name in zip(files, _names(files), strict=True):
        rows, bad = read_rows(file), []
        for number, row in enumerate(rows):
            try:
                pairs.append(_pair(row, name, seed))
            except BadRow as reason:
                bad.append((number, str(reason)))
        if bad:
            reasons = "; ".join(f"{n} x {reason}" for reason, n in Counter(reason for _, reason in bad).most_common(3))
            raise UserError(
                f"{file}: {len(bad)} of {len(rows)} rows are no labelled pairs (the first is row {bad[0][0]}, counted "
                f"from 0): {reasons}. Expected instruction (or prompt), output_1, output_2 and label (1, 2, or 0 for a "
                "tie) or labels; or prompt, chosen and rejected; or the files of LLMBar or PandaLM as they are. Row "
                f"{bad[0][0]} has the keys: {', '.join(map(str, rows[bad[0][0]])) or 'none'}."
            )
    return pairs


def _names(files: Sequence[Path]) -> list[str]:
    """A name for each file: its own, its folder's, or its path, the first that tells them apart."""
    resolved = [file.absolute() for file in files]
    for name in (lambda file: file.name.split(".")[0], lambda file: file.parent.name):
        names = [name(file) for file in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(file) for file in files]


def _pair(row: Row, name: str, seed: int) -> LabelledPair:
    """Raises BadRow where there is none."""
    asked = row
    if all(not str(row.get(key) or "").strip() for key in ("instruction", "prompt", "messages")) and row.get("input"):
        asked = {"prompt": row["input"]}  # LLMBar's name of the instruction
    instruction = whole_text(prompt_in(asked, 0, "").instruction)
    columns = next((each for each in _OUTPUTS if all(key in row for key in each)), None)
    if columns is None:
        raise BadRow("no two outputs")
    first, second = (_text(row, column) for column in columns)
    labels: tuple[int, ...]
    if columns[0] == "chosen":
        labels = (2 if model_first(instruction, seed) else 1,)
        first, second = (second, first) if labels == (2,) else (first, second)
    else:
        labels = _labels(row)
    category = next((str(row[key]) for key in ("category", "subset") if row.get(key) not in (None, "")), name)
    return LabelledPair(instruction, first, second, labels, category)


def _text(row: Row, column: str) -> str:
    value = row[column]
    if isinstance(value, bool | int | float) and value == value:
        return str(value)  # as PandaLM has an output `True`
    if not isinstance(value, str):
        raise BadRow(f"{column} is no text" + ": write a row for each pair" * isinstance(value, list))
    return whole_text(value)


def _labels(row: Row) -> tuple[int, ...]:
    given: Any = row.get("labels")
    if given is None:
        given = [row[key] for key in sorted(row) if _ANNOTATOR.fullmatch(key)] or [row.get("label")]
    elif isinstance(given, str):  # as CSV has it
        try:
            given = json.loads(given)
        except ValueError:
            raise BadRow("labels is no list") from None
    if not isinstance(given, list):
        raise BadRow("labels is no list")
    known = [label for label in given if label is not None and str(label).strip()]
    if not known:
        raise BadRow("no label")
    try:
        return tuple(_LABELS[str(label).strip().lower()] for label in known)
    except KeyError as unknown:
        raise BadRow(f"expected a label 1, 2, or 0 for a tie, found {unknown.args[0]!r:.20}") from None
