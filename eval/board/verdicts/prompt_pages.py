"""Pages of prompts, each with all outputs and verdicts side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval import layout
from eval.board.figures import Style
from eval.board.pages import render, write_page
from eval.board.run_files import Board
from eval.board.verdicts.examples import Example

PROMPTS_A_PAGE, OUTPUTS_A_PAGE = 100, 4_000  # where models are many, a page has fewer prompts


def write_prompt_pages(
    items: Sequence[Example],
    shown: Sequence[Example],
    board: Board,
    looks: Mapping[str, Style],
    out: Path,
    slug: str,
) -> tuple[list[str], dict[int, str]]:
    """Write the pages of a board's prompts into a folder; none where the report shows all of them.

    Args:
        items: all prompts.
        shown: those that the report shows.
        out: the report's folder.
        slug: of the board, in file names and anchors.

    Returns:
        The pages' names, and where each prompt is found: its number -> page and anchor, relative to `out`.
    """
    if len(items) == len(shown):
        return [], {item.number: f"{layout.REPORT}#{slug}-{item.number}" for item in items}
    size = min(PROMPTS_A_PAGE, max(5, OUTPUTS_A_PAGE // max(1, len(board.table))))
    parts = [items[i : i + size] for i in range(0, len(items), size)]
    pages = [f"verdicts-{slug}-{n}.html" for n in range(1, len(parts) + 1)]
    for n, part in enumerate(parts, 1):
        title = f"Verdicts on {board.task}" + (f", page {n} of {len(parts)}" if len(parts) > 1 else "")
        page = render(
            "verdicts.html.j2",
            title=title,
            items=part,
            total=len(items),
            pages=pages,
            current=n,
            looks=looks,
            slug=slug,
        )
        write_page(out / pages[n - 1], page)
    place = {
        item.number: f"{page}#{slug}-{item.number}" for page, part in zip(pages, parts, strict=True) for item in part
    }
    return pages, place
