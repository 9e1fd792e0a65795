"""Conversations of several turns, as MT-Bench has them: `instruction` and `output` are lists of the same length.

Each turn becomes a row: what was asked so far, and what was answered so far. What was asked is the same for every
model, so turns match a reference as other prompts do.
"""

from __future__ import annotations

from typing import Any, TypeGuard

from otpo.files import Row


def turns_of(row: Row) -> list[Row]:
    """The rows of a row's turns, with `turn` counted from 1; the row itself where it has no several turns.

    Counts of tokens and whether the output was cut belong to the whole, and stay with the last turn.
    """
    asked, said = row.get("instruction"), row.get("output")
    if not (_texts(asked) and _texts(said) and len(asked) == len(said) > 1):
        return [row]
    rest = {key: value for key, value in row.items() if key not in ("n_tokens", "truncated")}
    return [
        {
            **(row if turn == len(asked) else rest),
            "instruction": _joined(asked[:turn], "Request"),
            "output": _joined(said[:turn], "Answer"),
            "turn": turn,
        }
        for turn in range(1, len(asked) + 1)
    ]


def _texts(cell: Any) -> TypeGuard[list[str]]:
    return isinstance(cell, list) and all(isinstance(each, str) for each in cell)


def _joined(texts: list[str], what: str) -> str:
    """Several texts with their numbers above them; a single one as it is."""
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"[{what} {number}]\n{text}" for number, text in enumerate(texts, 1))
