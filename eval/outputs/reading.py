"""Reads a file of model outputs, in any of the shapes that people have, as rows with AlpacaEval's columns.

Rows have `instruction`, `output`, and usually `generator` and `dataset`. Alpaca's `input` becomes a part of the
instruction, as it is in training and in what the models were asked.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.outputs.columns import Columns, OutputColumns, find_columns, listed, way
from eval.outputs.turns import turns_of
from eval.tasks import content_of, transcript
from otpo.data.formats.cells import conversation_of, is_null, text_of
from otpo.data.formats.prompts import with_input
from otpo.data.rows import BadRow, Messages, Text
from otpo.errors import UserError
from otpo.files import Row, read_rows


@dataclass(frozen=True)
class OutputFile:
    """A file of outputs, read.

    Attributes:
        path: of the file.
        rows: with our names of columns. `output` is None where the row has none and that is allowed; `generator` is a
            text that says something, or not there.
        columns: which columns they are in the file.
        unread: why a row has no output -> in how many rows.
        several: how many generators a reference had, where it had several: a board knows it by one name, the file's.
    """

    path: Path
    rows: list[Row]
    columns: OutputColumns
    unread: Counter[str]
    several: int = 0

    @property
    def stem(self) -> str:
        """The file's name without its suffixes, for a model that has no other."""
        return whole_text(self.path.name.split(".")[0]) or "model"

    @property
    def said(self) -> list[str]:
        """What a person should know about how it was read; empty for AlpacaEval's own files."""
        remarks = [self.columns.said] if self.columns.said else []
        if self.unread:
            count = f"{self.unread.total()} of {len(self.rows)} rows have no output ({_counted(self.unread)})"
            remarks.append(f"{count}: counted as prompts without a verdict")
        if several := sum(row.get("turn", 0) > 1 for row in self.rows):
            remarks.append(f"{several} rows follow an earlier turn: each turn is judged with those before it")
        if empty := sum(row["output"] == "" for row in self.rows):
            remarks.append(f"{empty} of {len(self.rows)} outputs are empty texts, and are judged as they are")
        if self.several:
            remarks.append(f"outputs of {self.several} generators are the reference, which is called {self.stem}")
        return remarks


def load_outputs(
    path: str | Path, columns: Columns | None = None, *, reference: bool = False, count_missing: bool = False
) -> list[Row]:
    """The rows of `read_outputs`."""
    return read_outputs(path, columns, reference=reference, count_missing=count_missing).rows


def read_outputs(
    path: str | Path, columns: Columns | None = None, *, reference: bool = False, count_missing: bool = False
) -> OutputFile:
    """Read a file of model outputs, such as AlpacaEval's `model_outputs.json`.

    Args:
        path: a file that `otpo.files.read_rows` reads.
        columns: `judge.columns`, which column is what.
        reference: whether these are the reference's outputs; AlpacaEval's annotations hold both.
        count_missing: keep rows without an output, in place of refusing the file.

    Raises:
        UserError: the file cannot be read as rows, it is not clear which columns are instruction and output (see
            `find_columns`), a row has no text under one of them (an output may lack one with `count_missing`), its
            `input` is no text, or `n_tokens` is no number or `truncated` neither true nor false.
    """
    raw = read_rows(path)
    found = find_columns(raw, str(path), columns, reference=reference)
    rows: list[Row] = []
    no_instruction: list[tuple[int, str]] = []
    no_output: list[tuple[int, str]] = []
    numbered = [(number, turn) for number, each in enumerate(raw) for turn in turns_of(found.renamed(each))]
    for number, row in numbered:
        try:
            instruction = _instruction(row, found)
        except BadRow as reason:
            no_instruction.append((number, str(reason)))
            continue
        try:
            output = _output(row, found, instruction)
        except BadRow as reason:
            no_output.append((number, str(reason)))
            output = None
        rows.append(_typed({**row, "instruction": instruction, "output": output}, f"{path}: row {number}"))
    if no_instruction:
        raise _without_text(str(path), "instruction", no_instruction, raw)
    if no_output and not count_missing:
        raise _without_text(str(path), "output", no_output, raw)
    file = OutputFile(Path(path), rows, found, Counter(reason for _, reason in no_output))
    return _by_one(file) if reference else file


def _by_one(file: OutputFile) -> OutputFile:
    """A reference whose rows are all by one generator."""
    names = list(dict.fromkeys(row["generator"] for row in file.rows if "generator" in row))
    several = len(names) if len(names) > 1 else 0
    name = file.stem if several else names[0] if names else "reference"
    return replace(file, rows=[{**row, "generator": name} for row in file.rows], several=several)


# ---- one row ----


def _instruction(row: Row, found: OutputColumns) -> str:
    """The instruction of a renamed row, with its input; of messages, what is said before the output.

    Raises:
        BadRow: there is none.
    """
    said: Text
    if "instruction" in found.names:
        messages = not isinstance(row.get("instruction"), str) or "instruction" in found.written
        said = text_of(row, "instruction") if messages else row["instruction"]
    else:
        said = conversation_of(row, str(found.conversation))
        if "output" not in found.names and said and said[-1]["role"] == "assistant":
            said = said[:-1]
        if not said:
            raise BadRow(f"{found.conversation} holds none")
    return whole_text(with_input({**row, "instruction": said if isinstance(said, str) else transcript(said)}))


def _output(row: Row, found: OutputColumns, instruction: str) -> str:
    """The output of a renamed row: of messages the last one, of a list with a single text this one.

    Raises:
        BadRow: there is none; the message says what there is.
    """
    if "output" not in found.names:
        return _last(conversation_of(row, str(found.conversation)), instruction)
    cell = row.get("output")
    if isinstance(cell, str) and "output" not in found.written:
        return whole_text(cell)
    if is_null(cell):
        raise BadRow("not there" if "output" not in row else "null" if cell is None else "NaN")
    if isinstance(cell, bool | int | float):
        raise BadRow("true or false" if isinstance(cell, bool) else "a number")
    if isinstance(cell, list) and cell and all(isinstance(each, str) for each in cell):
        if len(cell) > 1:
            raise BadRow("several texts: keep one of them")
        return whole_text(cell[0])
    if isinstance(cell, dict) and not {"role", "from"} & cell.keys():
        raise BadRow(f"an object with the keys {listed(list(cell))}")
    said = text_of(row, "output")
    return whole_text(said) if isinstance(said, str) else _last(said, instruction)


def _last(messages: Messages, instruction: str) -> str:
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow("messages that do not end in one of the assistant")
    for message in messages[:-1]:
        text = whole_text(content_of(message)).strip()
        if message["role"] not in ("system", "developer") and text not in instruction and instruction not in text:
            raise BadRow("messages before the last one that say something else than the instruction")
    return whole_text(content_of(messages[-1]))


def _typed(row: Row, where: str) -> Row:
    """A row whose token count is a number and whose `truncated` is true or false, or None; CSV has text alone."""
    found = {key: whole_text(value) if isinstance(value, str) else value for key, value in row.items()}
    if "generator" in found:
        found["generator"] = "" if is_null(found["generator"]) else whole_text(str(found["generator"]))
        if not found["generator"].strip():
            del found["generator"]
    for column, (read, wanted) in _TYPED.items():
        if column in row:
            try:
                found[column] = read(row[column])
            except (ValueError, OverflowError):
                raise UserError(
                    f"{where}: expected {wanted} under {column}, found {row[column]!r:.40}. Correct it, or leave the "
                    f"column out, which a board can do without: {way(column, 'null')}."
                ) from None
    return found


def whole_text(text: str) -> str:
    """A text with a replacement character for each half of a surrogate pair, which UTF-8 cannot hold."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_unknown(value: Any) -> bool:
    blank = isinstance(value, str) and value.strip().lower() in ("", "none", "null", "nan", "na", "n/a")
    return blank or is_null(value)


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


_TYPED = {"n_tokens": (_count, "a number of tokens"), "truncated": (_truth, "true or false")}


# ---- errors ----


def _without_text(source: str, what: str, numbered: Sequence[tuple[int, str]], rows: Sequence[Row]) -> UserError:
    shown = ", ".join(str(number) for number, _ in numbered[:5])
    ways = " Write them, or leave the rows out."
    if what == "output":
        ways += " judge.count_missing counts them as prompts without a verdict."
    return UserError(
        f"{source}: {len(numbered)} of {len(rows)} rows have no text under {what} (rows {shown}, counted from 0): "
        f"{_counted(Counter(reason for _, reason in numbered))}. Row {numbered[0][0]} has the keys: "
        f"{listed(list(rows[numbered[0][0]]))}.{ways}"
    )


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(4))
