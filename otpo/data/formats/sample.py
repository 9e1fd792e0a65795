"""What the cells of a sample of rows tell about their columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from otpo.data.formats.cells import are_messages, is_blank, is_null
from otpo.data.rows import Row
from otpo.errors import UserError


def is_prose(cells: Sequence[Any]) -> bool:
    """Whether cells are texts of several words, most of them different: no names and no numbers."""
    texts = [cell.strip() for cell in cells if isinstance(cell, str) and not is_blank(cell)]
    words = sum(len(text.split()) > 1 for text in texts)
    return 2 * words > len(texts) and 2 * len(set(texts)) > len(texts)


def prose_of(columns: Sequence[str], sample: Sequence[Row]) -> tuple[str, ...]:
    """The columns in whose texts messages as text are no majority; chosen and rejected are of one kind."""
    groups = [("chosen", "rejected"), *((c,) for c in columns if c not in ("chosen", "rejected", "messages"))]
    found: list[str] = []
    for group in groups:
        texts = [row[column] for row in sample for column in group if isinstance(row.get(column), str)]
        if 2 * sum(map(are_messages, texts)) <= len(texts):
            found += [column for column in group if column in columns]
    return tuple(found)


def check_labels(cells: Sequence[Any], source: str) -> None:
    """Refuse labels that are numbers of a scale, of which 1 need not be good and 0 need not be bad."""
    numbers = set()
    for cell in cells:
        try:
            numbers.add(float(str(cell)))
        except ValueError:
            continue
    numbers = {number for number in numbers if not is_null(number)}
    if numbers - {-1, 0, 1} or {-1, 0} <= numbers:
        some = ", ".join(f"{number:g}" for number in sorted(numbers)[:6])
        raise UserError(
            f"{source}: expected labels that say whether a completion is good, found the numbers {some} of a scale."
            " Write true and false (or 1 and 0) for what is good and bad on it, and leave the rest out."
        )
