"""`otpo board import`: published rows and further columns, kept as copies of their files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from eval import layout
from eval.judge.panels.members import judge_label
from eval.judge.protocols.registry import find_protocol
from eval.published.alpaca_eval import PROTOCOL, TASK, published_rows, read_published
from eval.published.lm_eval import ERROR, LM_EVAL, Results, read_results
from eval.stats.length_control import OFFICIAL_REFERENCE, why_not_official
from jobs.boards.state import Import, State, digest_of, now, write_state
from jobs.judging import named_file
from otpo.errors import UserError
from otpo.files import Row, replacing
from pipeline.progress import Progress

FOLDER = "imported"


def import_files(
    folder: Path,
    state: State,
    reference: list[Row],
    files: Sequence[str],
    *,
    beside: bool,
    only: Sequence[str],
    judged_by: str,
    replace: bool,
    progress: Progress,
) -> State:
    """Take published rows (CSV of AlpacaEval) or columns (JSON of lm-evaluation-harness) into a board.

    Args:
        reference: the board's.
        files: each a path; of results also NAME=FILE, the board's model that they are of.
        beside: published rows that were judged otherwise stand in a table of their own.
        only: names of the published rows to take; empty takes all.
        judged_by: who judged the published rows.
        replace: a changed file may take the place of one that was imported.

    Returns:
        The board as it is then.

    Raises:
        UserError: files that cannot be read, rows that were judged otherwise, results of a model that is not on the
            board, or figures that differ from those that are there; nothing was changed.
    """
    taken: dict[str, tuple[Import, Path]] = {}
    for asked in files:
        name, path = named_file(asked)
        path = path.expanduser()
        if path.suffix.lower() == ".csv":
            if name:
                raise UserError(f"{asked}: the rows of a leaderboard have names of their own; leave {name}= out.")
            _check_rows(folder, state, reference, path, only, judged_by, beside=beside)
            kept = Import(
                kind="alpaca_eval", file=str(path), sha256=digest_of(path), added=now(), judge=judged_by, only=[*only]
            )
            stored = path.name
        else:
            results = read_results(path)
            model = _model_of(folder, state, name, results, path)
            if results.model and results.model.rsplit("/", 1)[-1] != model:
                progress(str(path), 0, 0, f"results of {results.model}, taken as those of {model}")
            kept = Import(kind="lm_eval", file=str(path), sha256=digest_of(path), added=now(), model=model)
            stored = f"{layout.folder_name(model)}-{path.name}"
        there = state.imported.get(stored)
        same = there and there.model_copy(update={"added": kept.added, "file": kept.file}) == kept
        if there and not same and not replace:
            raise UserError(
                f"{folder} has {stored} of {there.file}, imported {there.added}, and {path} is another: --replace "
                "takes it in its place."
            )
        if not same:
            taken[stored] = kept, path
    changed = state.model_copy(update={"imported": state.imported | {name: kept for name, (kept, _) in taken.items()}})
    _columns(changed, {name: folder / FOLDER / name for name in state.imported} | {n: p for n, (_, p) in taken.items()})
    for stored, (_, path) in taken.items():
        with replacing(folder / FOLDER / stored) as partial:
            shutil.copyfile(path, partial)
    write_state(folder, changed)
    return changed


def with_imports(board: pd.DataFrame, folder: Path, state: State, reference: list[Row]) -> pd.DataFrame:
    """A board with the columns and rows that were imported."""
    columns = _columns(state, {name: folder / FOLDER / name for name in state.imported})
    names = list(dict.fromkeys(column for figures in columns.values() for column in figures))
    for column in names:
        board[column] = [columns.get(name, {}).get(column) for name in board["name"]]
    tables = [board]
    for name, each in state.imported.items():
        if each.kind == "alpaca_eval":
            frame = read_published(folder / FOLDER / name)
            frame = frame[frame["name"].isin(each.only)] if each.only else frame
            ours = _why_other(folder, state, reference, str(each.judge)) == ""
            own = {row for table in tables for row in table["name"]}
            task = state.task if ours else TASK
            tables.append(published_rows(frame, judge=str(each.judge), task=task, file=Path(each.file).name, taken=own))
    if len(tables) == 1:
        return board
    whole = pd.concat([table for table in tables if len(table)] or [board], ignore_index=True)
    judged_here = whole["imported"].fillna("") == ""
    whole = whole.assign(_here=judged_here).sort_values(["_here", "win_rate"], ascending=False, kind="stable")
    return whole.drop(columns="_here").reset_index(drop=True)


def _check_rows(
    folder: Path, state: State, reference: list[Row], path: Path, only: Sequence[str], judge: str, *, beside: bool
) -> None:
    frame = read_published(path)
    if unknown := [name for name in only if name not in set(frame["name"])]:
        raise UserError(f"--model {unknown[0]}: {path} has no such row; it has {', '.join(frame['name'][:8])}, ...")
    if not beside and (why := _why_other(folder, state, reference, judge)):
        raise UserError(
            f"The rows of {path} were judged by {judge} with the {PROTOCOL} prompt against {OFFICIAL_REFERENCE} in one "
            f"order, and {folder} is not: {why}. Such figures cannot be compared. --beside shows them in a table of "
            "their own."
        )


def _why_other(folder: Path, state: State, reference: list[Row], judge: str) -> str:
    """Why published rows that `judge` judged cannot stand among those of a board; empty if they can."""
    config = state.config(folder)
    protocol = None if config.reward_model else find_protocol(config.protocol)
    found = []
    if (label := judge_label(config)) != judge:
        found.append(f"its judge is {label}")
    if protocol is None or protocol.label != PROTOCOL:
        found.append(f"its protocol is {state.protocol}")
    if config.both_orders:
        found.append("it asks in both orders")
    if why := why_not_official(reference):
        found.append(why)
    if not state.task.startswith(TASK):
        found.append(f"its task is {state.task}")
    return "; ".join(found)


def _model_of(folder: Path, state: State, name: str | None, results: Results, path: Path) -> str:
    said = results.model
    known = next((model for model in (said, said.rsplit("/", 1)[-1]) if model in state.models), None)
    if name is None and known is None:
        there = ", ".join(state.models) or "none yet"
        raise UserError(
            f"{path} has results of {said or 'a model that it does not name'}, and the models of {folder} are {there}: "
            f"say whose they are, NAME={path}."
        )
    if name is not None and name not in state.models:
        raise UserError(
            f"{name}={path}: {folder} has no model '{name}'; there are {', '.join(state.models) or 'none'}."
        )
    return name or str(known)


def _columns(state: State, places: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """Model -> its imported figures by column. `places` says where the imported files lie.

    Raises:
        UserError: two files say the same figure of a model, with different values.
    """
    found: dict[str, dict[str, Any]] = {}
    source: dict[tuple[str, str], str] = {}
    for name, each in state.imported.items():
        if each.kind != "lm_eval" or each.model not in state.models:
            continue
        results, figures = read_results(places[name]), found.setdefault(str(each.model), {})
        columns = {LM_EVAL + column: value for column, value in results.values.items()}
        columns |= {ERROR + column: value for column, value in results.errors.items()}
        for column, value in columns.items():
            if figures.get(column, value) != value:
                earlier = source[str(each.model), column]
                raise UserError(
                    f"{each.file} and {state.imported[earlier].file} differ in {column} of {each.model}: {value:g} "
                    f"and {figures[column]:g}. Take one off: `otpo board remove DIR {earlier}`."
                )
            figures[column] = value
            source.setdefault((str(each.model), column), name)
    return found
