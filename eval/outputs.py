"""Model outputs: reading them, and joining them with the reference's outputs or with the prompts that were judged.

Rows have AlpacaEval's columns: `instruction`, `output`, and usually `generator` and `dataset`. Alpaca's `input` becomes
a part of the instruction, as it is in training and in what the models were asked. An instruction may occur in several
rows: its first row here belongs to its first row elsewhere, its second row to the second, and so on.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from otpo.data.formats.prompts import with_input
from otpo.data.rows import BadRow
from otpo.errors import UserError
from otpo.files import Row, read_rows

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Pair:
    """A model's output beside the reference's output for the same instruction.

    Attributes:
        index: position in the reference, counted from 0.
        instruction: what both were asked.
        reference: the reference's output.
        output: the model's output.
        generator: the model's name.
        reference_generator: the reference's name.
    """

    index: int
    instruction: str
    reference: str
    output: str
    generator: str
    reference_generator: str


def load_outputs(path: str | Path) -> list[Row]:
    """Read a file of model outputs, such as AlpacaEval's `model_outputs.json`.

    Raises:
        UserError: the file cannot be read as rows (see `otpo.files.read_rows`), a row has no text under `instruction`
            or `output`, its `input` is no text, or `n_tokens` is no number or `truncated` neither true nor false.
    """
    rows = read_rows(path)
    _require_texts(rows, str(path))
    return [_read(row, f"{path}: row {number}") for number, row in enumerate(rows)]


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


def match_outputs(outputs: Sequence[Row], reference: Sequence[Row], *, subset: bool = False) -> list[Pair]:
    """Pair a model's outputs with the reference's. Both must cover the same instructions, as in AlpacaEval.

    Args:
        outputs: the model's rows, in any order.
        reference: the reference's rows.
        subset: allow `outputs` to cover only some of the reference's instructions.

    Returns:
        The pairs, in the order of the reference.

    Raises:
        UserError: an output has no counterpart in the reference; a row of the reference has no counterpart among the
            outputs (unless `subset`); nothing matches at all; or a row has no text.
    """
    _require_texts(outputs, "The outputs")
    _require_texts(reference, "The reference")
    ours, theirs = by_occurrence(outputs), by_occurrence(reference)
    without_reference = [instruction for instruction, n in ours if (instruction, n) not in theirs]
    without_output = [instruction for instruction, n in theirs if (instruction, n) not in ours]
    if without_reference or (without_output and not subset) or not ours:
        raise UserError(_mismatch(len(outputs), len(reference), without_reference, [] if subset else without_output))
    return [
        Pair(
            index=index,
            instruction=row["instruction"],
            reference=row["output"],
            output=ours[key]["output"],
            generator=str(ours[key].get("generator") or "model"),
            reference_generator=str(row.get("generator") or "reference"),
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


def require_rows(rows: Sequence[Row], source: str, good: Callable[[Row], bool], wanted: str) -> None:
    """Check every row.

    Args:
        rows: the rows.
        source: what they were read from, for the error.
        good: whether a row will do.
        wanted: the columns, one of which must hold a text, for the error.

    Raises:
        UserError: rows that will not do; the message has their numbers and the keys of the first.
    """
    bad = [number for number, row in enumerate(rows) if not good(row)]
    if bad:
        shown = ", ".join(map(str, bad[:5]))
        raise UserError(
            f"{source}: {len(bad)} of {len(rows)} rows have no text under {wanted} (rows {shown}, counted from 0). "
            f"Row {bad[0]} has the keys: {', '.join(map(str, rows[bad[0]])) or 'none'}."
        )


def _read(row: Row, where: str) -> Row:
    """A row whose instruction is whole, whose token count is a number and whose `truncated` is true or false, or None.

    CSV has text alone.
    """
    typed = {
        "n_tokens": (_count, "a number of tokens"),
        "truncated": (_truth, "true or false"),
    }
    row = {key: _whole(value) if isinstance(value, str) else value for key, value in row.items()}
    try:
        found = row | {"instruction": with_input(row)}
    except BadRow as reason:
        raise UserError(f"{where}: {reason}. Make it text, or leave the column out.") from None
    for column, (read, wanted) in typed.items():
        if column in row:
            try:
                found[column] = read(row[column])
            except (ValueError, OverflowError):
                raise UserError(
                    f"{where}: expected {wanted} under {column}, found {row[column]!r:.40}. Correct it, or leave the "
                    "column out: a board can do without it."
                ) from None
    return found


def _whole(text: str) -> str:
    """A text with a replacement character for each half of a surrogate pair, which UTF-8 cannot hold."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_unknown(value: Any) -> bool:
    blank = isinstance(value, str) and value.strip().lower() in ("", "none", "null", "nan", "na", "n/a")
    return value is None or blank or (isinstance(value, float) and math.isnan(value))


def _count(value: Any) -> int | None:
    if _is_unknown(value):
        return None
    number = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    if not (number >= 0 and number.is_integer()):
        raise ValueError
    return int(number)


def _truth(value: Any) -> bool | None:
    if _is_unknown(value):
        return None
    text = str(value).strip().lower()
    if text not in ("true", "false", "1", "0", "1.0", "0.0", "yes", "no"):
        raise ValueError
    return text in ("true", "1", "1.0", "yes")


def _require_texts(rows: Sequence[Row], source: str) -> None:
    require_rows(rows, source, lambda row: isinstance(row.get("instruction"), str), "instruction")
    require_rows(rows, source, lambda row: isinstance(row.get("output"), str), "output")


def _mismatch(n_outputs: int, n_reference: int, without_reference: list[str], without_output: list[str]) -> str:
    def examples(texts: list[str]) -> str:
        return "; ".join(repr(text[:80]) for text in texts[:3])

    parts = [f"The outputs ({n_outputs} rows) and the reference ({n_reference} rows) differ in their instructions."]
    if without_reference:
        parts.append(f"{len(without_reference)} outputs have no reference, e.g. {examples(without_reference)}.")
    if without_output:
        parts.append(
            f"{len(without_output)} instructions of the reference have no output, e.g. {examples(without_output)}."
        )
    parts.append(
        "Generate both from the same prompts, say that you judge a subset (`otpo judge --subset`), or, where a file "
        "holds several generators that are one model, name it (`--name`)."
    )
    return " ".join(parts)
