"""Rows that hold a prompt alone: to be answered, not trained on. Read as the prompts of training's rows are."""

from __future__ import annotations

from otpo.data.formats.cells import conversation_of, is_blank, text_of
from otpo.data.formats.columns import instruction_of
from otpo.data.formats.context import context_of
from otpo.data.formats.names import BESIDE, CONTEXT, MEDIA
from otpo.data.rows import BadRow, Parts, Row, content


def prompt_of(row: Row) -> Parts | None:
    """The prompt of a row, without completions; None where no column holds one.

    `messages`, or `instruction` and after a blank line `input`, or `prompt` (text or messages); with the system prompt,
    the tools, the earlier turns and the variables of the chat template that the row has.

    Raises:
        BadRow: a cell is not what it should be, or a column would be dropped although it says something.
    """
    parts = _alone(row)
    if parts is None:
        return None
    _check_dropped(row, parts)
    found = {what: next((name for name in names if name in row), what) for what, names in CONTEXT.items()}
    context = context_of(row, found)
    return context.before(parts) if context else parts


def with_input(row: Row) -> str:
    """The instruction of a row of outputs, and after a blank line its `input`, unless one of the two holds the other.

    Raises:
        BadRow: `input` is no text.
    """
    instruction, given = row["instruction"], row.get("input")
    if isinstance(given, str) and (given.strip() in instruction or instruction.strip() in given):
        return instruction
    return instruction_of(row)


def _alone(row: Row) -> Parts | None:
    if not is_blank(row.get("messages")):
        return Parts(conversation_of(row, "messages"), ())
    if not is_blank(row.get("instruction")):
        return Parts(instruction_of(row), ())
    if not is_blank(row.get("prompt")):
        return Parts(text_of(row, "prompt"), ())
    return None


def _check_dropped(row: Row, parts: Parts) -> None:
    said = content(parts.prompt)
    for column in (*BESIDE, *MEDIA):
        cell = row.get(column)
        if is_blank(cell) or (isinstance(cell, str) and cell.strip() in said):
            continue
        if column in MEDIA:
            raise BadRow(f"the column {column} holds something, and a prompt is text alone: leave such rows out")
        raise BadRow(
            f"the column {column} says something that the prompt does not: put it into the prompt, or name the columns "
            "instruction and input; or leave the column out"
        )
