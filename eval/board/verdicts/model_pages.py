"""A page for each model of a board: its verdicts, to be sorted and filtered, each with a link to the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import layout
from eval.board.pages import render, write_page
from eval.board.run_files import Board
from eval.board.verdicts.examples import Example, ShownOutput

FOLDER = "model_pages"
KINDS = ("lost", "won", "tied", "no verdict", "orders disagree", "longer and won", "shorter and lost")
_OF_OUTCOME = {"wins": "won", "loses": "lost", "ties": "tied", "no verdict": "no verdict"}


@dataclass(frozen=True)
class Line:
    """One prompt on a model's page.

    Attributes:
        example: the prompt with its outputs.
        output: the model's own.
        place: page and anchor where the outputs stand side by side, as a link from the model's page.
        ratio: length of the model's output over that of the reference's; None where one is missing or empty.
        kinds: those of KINDS that it is one of.
    """

    example: Example
    output: ShownOutput
    place: str
    ratio: float | None
    kinds: tuple[str, ...]


def write_model_pages(
    items: Sequence[Example],
    place: Mapping[int, str],
    rows: Sequence[Mapping[str, Any]],
    board: Board,
    out: Path,
    slug: str,
) -> dict[str, str]:
    """Write `model_pages/<board>/<model>.html` for each model that has verdicts.

    Args:
        items: all prompts of the board.
        place: number of a prompt -> page and anchor, relative to `out`.
        rows: the board's table.
        out: the report's folder.
        slug: of the board.

    Returns:
        Model -> its page, relative to `out`.
    """
    lines: dict[str, list[Line]] = {}
    for item in items:
        for output in item.outputs:
            lines.setdefault(output.name, []).append(_line(item, output, f"../../{place[item.number]}"))
    pages = {}
    for row in rows:
        if own := lines.get(row["name"]):
            counts = {kind: sum(kind in line.kinds for line in own) for kind in KINDS}
            page = render(
                "model.html.j2",
                title=f"{row['name']} on {board.task}",
                row=row,
                lines=own,
                kinds=[kind for kind, n in counts.items() if n],
                counts=counts,
                board=board,
                asked_twice=any(line.output.flipped is not None for line in own),
                has_words=any(line.output.said for line in own),
            )
            name = f"{FOLDER}/{slug}/{layout.folder_name(row['name'])}.html"
            write_page(out / name, page)
            pages[row["name"]] = name
    return pages


def _line(item: Example, output: ShownOutput, place: str) -> Line:
    ratio = output.length / len(item.reference) if output.text is not None and item.reference else None
    kinds = [_OF_OUTCOME[output.outcome]]
    if output.flipped:
        kinds.append("orders disagree")
    if ratio is not None and ratio > 1 and output.outcome == "wins":
        kinds.append("longer and won")
    if ratio is not None and ratio < 1 and output.outcome == "loses":
        kinds.append("shorter and lost")
    return Line(item, output, place, ratio, tuple(kinds))
