"""Joins model outputs with the reference's outputs, or with the prompts that were judged.

Rows have AlpacaEval's columns (`eval.outputs.reading`). An instruction may occur in several rows: its first row here
belongs to its first row elsewhere, its second row to the second, and so on.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from otpo.errors import UserError
from otpo.files import Row

T = TypeVar("T", bound=Hashable)

JUDGED = (
    "Generate both from the same prompts, say that you judge a subset (`otpo judge --subset`), or, where a file holds "
    "several generators that are one model, name it (`otpo judge NAME=FILE`)."
)


@dataclass(frozen=True)
class Pair:
    """A model's output beside the reference's output for the same instruction.

    Attributes:
        index: position in the reference, counted from 0.
        instruction: what both were asked.
        reference: the reference's output; empty where it has none.
        output: the model's output; empty where it has none.
        generator: the model's name.
        reference_generator: the reference's name.
        missing: which of the two outputs is missing, "no_output" or "no_reference"; empty where none is.
    """

    index: int
    instruction: str
    reference: str
    output: str
    generator: str
    reference_generator: str
    missing: str = ""


def with_inputs_of(outputs: Sequence[Row], reference: Sequence[Row]) -> list[Row]:
    """The reference's rows, those without an `input` with the one that the outputs of the same instruction have."""
    whole: dict[tuple[str, int], Row] = {}
    for (instruction, n), row in zip(occurrences(_bare(row) for row in outputs), outputs, strict=True):
        if row["instruction"] != instruction:
            whole[instruction, n] = {"instruction": row["instruction"], "input": row["input"]}
    numbered = zip(occurrences(row["instruction"] for row in reference), reference, strict=True)
    return [row if row.get("input") else row | whole.get(key, {}) for key, row in numbered]


def with_instructions_of(outputs: Sequence[Row], reference: Sequence[Row]) -> tuple[list[Row], int]:
    """The outputs with the reference's spelling of instructions, where white space or Unicode form alone differ.

    Returns:
        The rows, and how many of them were spelled otherwise.
    """
    known = {row["instruction"] for row in reference}
    spelled: dict[str, str] = {}
    for row in reference:
        spelled.setdefault(_spelling(row["instruction"]), row["instruction"])
    rows = [
        row
        if row["instruction"] in known
        else {**row, "instruction": spelled.get(_spelling(row["instruction"]), row["instruction"])}
        for row in outputs
    ]
    return rows, sum(a["instruction"] != b["instruction"] for a, b in zip(rows, outputs, strict=True))


def _spelling(text: str) -> str:
    """A text without what editors and file formats change: line ends, white space at ends of lines, Unicode form."""
    lines = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join(line.rstrip() for line in lines).strip()


def _bare(row: Row) -> str:
    """The instruction without the input after it."""
    given = row.get("input")
    return row["instruction"].removesuffix(f"\n\n{given}") if isinstance(given, str) else row["instruction"]


def match_outputs(
    outputs: Sequence[Row], reference: Sequence[Row], *, subset: bool = False, owner: str = "", otherwise: str = JUDGED
) -> list[Pair]:
    """Pair a model's outputs with the reference's. Both must cover the same instructions, as in AlpacaEval.

    Args:
        outputs: the model's rows, in any order; `output` is None where it has none.
        reference: the reference's rows.
        subset: allow `outputs` to cover only some of the reference's instructions.
        owner: whose outputs they are, for the error.
        otherwise: what to do about outputs that do not match, for the error.

    Returns:
        The pairs, in the order of the reference.

    Raises:
        UserError: an output has no counterpart in the reference; a row of the reference has no counterpart among the
            outputs (unless `subset`); or nothing matches at all.
    """
    ours, theirs = by_occurrence(outputs), by_occurrence(reference)
    without_reference = [instruction for instruction, n in ours if (instruction, n) not in theirs]
    without_output = [instruction for instruction, n in theirs if (instruction, n) not in ours]
    if without_reference or (without_output and not subset) or not ours:
        counts = f"({len(outputs)} rows) and the reference ({len(reference)} rows)"
        often = [text for text in without_reference if (text, 0) in theirs]
        without_reference = [text for text in without_reference if (text, 0) not in theirs]
        said = _mismatch(without_reference, [] if subset else without_output, often)
        raise UserError(
            f"The outputs{owner and f' of {owner}'} {counts} differ in their instructions. {said} {otherwise}"
        )
    return [
        Pair(
            index=index,
            instruction=row["instruction"],
            reference=row["output"] or "",
            output=ours[key]["output"] or "",
            generator=str(ours[key].get("generator") or "model"),
            reference_generator=str(row.get("generator") or "reference"),
            missing="no_output" if ours[key]["output"] is None else "no_reference" if row["output"] is None else "",
        )
        for index, (key, row) in enumerate(theirs.items())
        if key in ours
    ]


def rows_of_prompts(
    instructions: Iterable[str], rows: Iterable[Mapping[str, Any]], owner: str
) -> list[Mapping[str, Any]]:
    """The row of outputs that belongs to each judged prompt.

    Args:
        instructions: one a prompt, in the order of the prompts.
        rows: rows of outputs, in any order.
        owner: whose outputs they are, for the error.

    Raises:
        UserError: a prompt has no row.
    """
    found, keys = by_occurrence(rows), occurrences(instructions)
    if missing := [instruction for instruction, n in keys if (instruction, n) not in found]:
        raise UserError(
            f"outputs of {owner}: expected one for each of the {len(keys)} judged prompts, {len(missing)} are missing "
            f"(the first: {missing[0][:80]!r}). Give the file that was judged."
        )
    return [found[key] for key in keys]


def length_of(row: Mapping[str, Any]) -> float:
    """Characters of a row's output; NaN where it has none."""
    return math.nan if row["output"] is None else float(len(row["output"]))


def by_occurrence(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], Mapping[str, Any]]:
    """(instruction, how many earlier rows have the same instruction) -> row, in the order of the rows."""
    rows = list(rows)
    return dict(zip(occurrences(row["instruction"] for row in rows), rows, strict=True))


def occurrences(values: Iterable[T]) -> list[tuple[T, int]]:
    """Each value with the number of equal values before it: a, b, a gives (a, 0), (b, 0), (a, 1)."""
    seen: Counter[T] = Counter()
    numbered = []
    for value in values:
        numbered.append((value, seen[value]))
        seen[value] += 1
    return numbered


def _mismatch(without_reference: list[str], without_output: list[str], often: list[str]) -> str:
    def examples(texts: list[str]) -> str:
        return "; ".join(repr(text[:80]) for text in texts[:3])

    parts = []
    if without_reference:
        parts.append(f"{len(without_reference)} outputs have no reference, e.g. {examples(without_reference)}.")
    if without_output:
        parts.append(
            f"{len(without_output)} instructions of the reference have no output, e.g. {examples(without_output)}."
        )
    if often:
        parts.append(
            f"{len(often)} outputs are of instructions that the reference has less often, e.g. {examples(often)}: keep "
            "one output of each."
        )
    return " ".join(parts)
