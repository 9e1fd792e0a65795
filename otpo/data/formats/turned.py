"""Columns beside a chosen and a rejected answer that may say of some pairs that they are the other way round."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from otpo.data.formats.beside import way, way_by_number, way_by_truth
from otpo.data.formats.cells import is_blank
from otpo.data.formats.names import ALIASES, HALF, plain
from otpo.data.formats.sample import may_be_text
from otpo.data.rows import Row
from otpo.errors import UserError

TURNED = re.compile(r"(?:(?:is|was|label|labels|pair)[_ -]?)?(?:flip(?:ped)?|swap(?:ped)?|reversed?|inverted)")
DECIDES = {
    *ALIASES["winner"], *ALIASES["better_response_id"], *ALIASES["label"], "labels", "human_label", "human_preference",
    "gold_label", "annotator_label", "verdict",
}  # fmt: skip
NO = {"0", "false", "no", "n", "f", "-1", "original", "unchanged"}
SIDE = re.compile(r"(?:(?:model|assistant|response|answer|completion|output)[_ ]?)?(?:[ab012]|chosen|rejected)|-1")
TIE = re.compile(r"true|false|tie.*|both.*|neither|equal|same")


def check_turned(
    columns: Sequence[str], names: Mapping[str, str], rows: Sequence[Row], source: str, unread: Sequence[str]
) -> None:
    """Refuse pairs beside which a column tells the rows apart as by which answer is better, or which are flipped.

    Args:
        columns: of the format. names: a column as the format calls it -> as the file does, where they differ.
        unread: columns that hold something and are not read.
    """
    if not {"chosen", "rejected"} <= {*columns}:
        return
    texts = [each for each in unread if HALF.search(each) and any(may_be_text(row.get(each)) for row in rows)]
    prompt, chosen, rejected = (names.get(each, each) for each in (columns[0], "chosen", "rejected"))
    known = columns[0] not in ("chosen", "rejected")
    for column in unread:
        words = _words(row.get(column) for row in rows)
        turned = bool(TURNED.fullmatch(plain(column)) and words - NO)
        # where the file has the two responses of a winner too, the winner is about these
        decides = plain(column) in DECIDES and len(texts) < 2 and _names_sides(words)
        if not (turned or decides):
            continue
        said = ", ".join(sorted(words)[:6])
        ways = [f"{way(column, None)} takes {chosen} and {rejected} as they stand."]
        if known and words <= {"0", "1", "true", "false"}:
            one, other = (rejected, chosen) if turned else (chosen, rejected)
            ways.append(way_by_truth(column, prompt, one, other))
        if known and decides and words <= {"0", "1"}:
            ways.append(way_by_number(column, prompt, chosen, rejected))
        raise UserError(
            f"{source}: expected that {chosen} is the better answer of each pair; the column {column} has {said}, which"
            f" may say that it is the worse one in some rows. {' '.join(ways)} Otherwise write the better text as"
            f" {chosen}."
        )


def _words(cells: Iterable[Any]) -> set[str]:
    """Cells in one spelling: 1.0 as 1."""
    words = {str(cell).strip().lower() for cell in cells if not is_blank(cell)}
    return {word.removesuffix(".0") for word in words}


def _names_sides(words: set[str]) -> bool:
    """Whether a column has several values (or the word rejected alone), all of them names of one of two sides."""
    sides = {word for word in words if SIDE.fullmatch(word) or word in ("true", "false")}
    several = len(sides) > 1 or any(word.endswith("rejected") for word in sides)
    return several and all(word in sides or TIE.fullmatch(word) for word in words)
