"""Columns beside those that a reading takes: none that says something of the prompt or the answers is dropped."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from otpo.data.formats.cells import conversation_of, is_blank
from otpo.data.formats.names import BESIDE, CONTEXT, CONVERSATIONS, MEDIA, OF_ANSWER, TEXTS, plain
from otpo.data.rows import REASONING, BadRow, Parts, Row, content

_KINDS = {
    **dict.fromkeys(("instruction", "instructions", *TEXTS), "prompt"),
    **dict.fromkeys(BESIDE, "beside"),
    **{f"{side}{key}": "thoughts" for side in ("", "chosen_", "rejected_") for key in (*REASONING, *OF_ANSWER)},
    **{name: what for what, names in CONTEXT.items() for name in names},
    **dict.fromkeys(CONVERSATIONS, "messages"),
    **dict.fromkeys(MEDIA, "media"),
}


def way(what: str, column: str | None) -> str:
    """The mapping that an error proposes."""
    return f"data.columns: {{{what}: {'null' if column is None else column}}}"


def way_by_truth(column: str, prompt: str, better: str, other: str) -> str:
    """The mapping that reads a column of 1 and 0, or true and false, as whether one of two responses is better."""
    return (
        f"If 1 or true says that {better} is better: data.columns: {{history: {prompt}, human_ref_A: {better},"
        f" human_ref_B: {other}, labels: {column}}}."
    )


def way_by_number(column: str, prompt: str, first: str, second: str) -> str:
    """The mapping that reads a column of 0 and 1 as the number of the better response."""
    return (
        f"If 0 is {first} and 1 is {second}: data.columns: {{response_0: {first}, response_1: {second},"
        f" better_response_id: {column}}}."
    )


@cache
def kind_of(column: str) -> str:
    """What a column of this name usually says: "prompt", "beside" (what the prompt is about), "thoughts" (of an
    answer), "messages", "media", a key of `CONTEXT`; "" for any other column.
    """
    return _KINDS.get(plain(column), "")


def dropped(row: Row, taken: frozenset[str], parts: Parts) -> Iterator[str]:
    """The columns that say something of prompt or answers which neither the parts nor a column of `taken` says."""
    for column, cell in row.items():
        if column not in taken and (kind := kind_of(column)) and not is_blank(cell):
            if not _is_said(row, column, kind, parts):
                yield column


def check_dropped(row: Row, taken: frozenset[str], parts: Parts) -> None:
    """Raise BadRow for the first column of `dropped`."""
    for column in dropped(row, taken, parts):
        kind = kind_of(column)
        if kind in ("messages", "prompt"):
            raise BadRow(f"{column} says something else than the prompt ({way(column, None)} leaves the column out)")
        read = f"{way(kind, column)} reads it, " if kind in CONTEXT else ""
        raise BadRow(f"the column {column} says something that is not read ({read}{way(column, None)} leaves it out)")


def check_sides(row: Row, parts: Parts) -> None:
    """Raise BadRow where a completion only names the column that holds it, or ends like its name."""
    for text in parts.completions if len(parts.completions) == 2 else ():
        if not isinstance(text, str) or len(text) > 40:
            continue
        said = text.strip().lower()
        for column, cell in row.items() if said and said not in ("chosen", "rejected") else ():
            name = plain(column)
            if name == said or (len(said) < 3 and name[: -len(said)].endswith(("_", "-", " ")) and name.endswith(said)):
                if isinstance(cell, str) and not is_blank(cell) and not _is_in(cell, content(parts.prompt)):
                    raise BadRow(
                        f"chosen or rejected is {text.strip()!r}, which names the column {column}: write the texts of"
                        " the two columns there, or map the columns: data.columns: {winner: chosen, rejected: null,"
                        " response_a: COLUMN, response_b: COLUMN}"
                    )


def _is_said(row: Row, column: str, kind: str, parts: Parts) -> bool:
    cell = row[column]
    if kind == "media":
        return False
    if kind == "messages" or (kind == "prompt" and isinstance(cell, list | dict)):
        return repeats(parts, row, column)
    if kind == "thoughts":
        return any(_is_in(cell, "".join(map(str, text))) for text in parts.completions)
    if plain(column) == "user" and isinstance(cell, str) and len(cell.split()) < 2:
        return True  # who asked
    return _is_in(cell, content(parts.prompt))


def _is_in(cell: Any, text: str) -> bool:
    """Whether a text has all strings of a cell, of which there is at least one."""
    strings = list(_strings(cell))
    return bool(strings) and all(each.strip() in text for each in strings)


def _strings(cell: Any) -> Iterator[str]:
    if isinstance(cell, str):
        yield cell
    elif isinstance(cell, list | dict):
        for each in cell.values() if isinstance(cell, dict) else cell:
            yield from _strings(each)


def repeats(parts: Parts, row: Row, column: str) -> bool:
    """Whether a column of messages (or a prompt beside messages) is the prompt or the whole row.

    Raises:
        BadRow: it holds no messages.
    """
    turns = _turns(parts.prompt, "user")
    whole = turns + _turns(parts.completions[0], "assistant")
    said = [(message["role"], message.get("content") or "") for message in conversation_of(row, column)]
    return said == whole[: len(said)] or said[: len(turns)] == turns or said == whole[len(turns) :]


def _turns(text: Any, role: str) -> list[tuple[str, str]]:
    messages = [{"role": role, "content": text}] if isinstance(text, str) else text
    return [(message["role"], message.get("content") or "") for message in messages]
