"""What a kept leaderboard shows: leaderboard.csv, .json and .md, the pages, and nothing of what is gone."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from eval import layout
from eval.board.leaderboard import COLUMNS
from eval.board.verdicts.model_pages import FOLDER as MODEL_PAGES
from eval.judge.config import JudgeConfig
from jobs.boards.importing import FOLDER as IMPORTED
from jobs.boards.importing import with_imports
from jobs.boards.state import State
from otpo.files import Row, write_atomically
from pipeline.judge.board import make_board, write_judged

INDEX = "index.html"
_INDEX = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Leaderboard</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'">
<meta http-equiv="refresh" content="0; url={layout.REPORT}"></head>
<body><p><a href="{layout.REPORT}">Leaderboard</a></p></body></html>
"""


def write_board(
    folder: Path,
    state: State,
    config: JudgeConfig,
    verdicts: pd.DataFrame,
    outputs: Mapping[str, list[Row]],
    reference: list[Row],
) -> pd.DataFrame:
    """Write all that is made of a board's verdicts and imports, and remove pages and outputs of models that are gone.

    Returns:
        The leaderboard.
    """
    judged = {name: rows for name, rows in outputs.items() if name in set(verdicts["generator"])}
    board = make_board(verdicts, judged, reference, config) if judged else pd.DataFrame(columns=list(COLUMNS))
    board = with_imports(board, folder, state, reference)
    before = {page: page.stat().st_mtime_ns for page in _pages(folder)}
    write_judged(folder, state.task, verdicts, board, {}, reference)
    write_atomically(folder / INDEX, _INDEX)
    for page, written in before.items():
        if page.exists() and page.stat().st_mtime_ns == written:
            page.unlink()
    known = {layout.folder_name(name) for name in state.models}
    for place in (folder / layout.MODELS).glob("*"):
        if place.name not in known:
            shutil.rmtree(place)
    for place in (folder / IMPORTED).glob("*"):
        if place.name not in state.imported:
            place.unlink()
    return board


def _pages(folder: Path) -> list[Path]:
    return [*folder.glob("verdicts-*.html"), *folder.glob(f"{MODEL_PAGES}/*/*.html")]
