"""Reads the folder of a run, a sweep or `otpo judge` for the report. A missing part stays empty; it is not an error."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import yaml

from eval import layout
from eval.board.leaderboard import CONTEXT_COLUMNS, read_leaderboard
from otpo.errors import UserError
from otpo.files import write_atomically

T = TypeVar("T")


@dataclass
class RunFiles:
    """What one folder holds.

    Attributes:
        name: of the folder.
        board: its leaderboard.csv.
        verdicts: task -> table of verdicts.
        outputs: task (as its folder is called) -> label -> rows of outputs.
        references: task (as its folder is called) -> the reference's rows.
        metrics: label -> the lines of its metrics.jsonl.
        weights: the rows of weights.json.
        world: what is known of a small world, world.json.
        agreement: how far a judge agrees with people, agreement.json.
        panel: how far the judges of a panel agree, panel.json, by task.
        sweep: what the trials of each swept label showed, sweep.json.
        manifest: manifest.json.
        recipe: recipe.yaml, as text.
        labels: what the recipe names; what other labels left in the folder is not read. None without a recipe.
        problems: one sentence for each file that is there but cannot be read.
    """

    name: str
    board: pd.DataFrame | None = None
    verdicts: dict[str, pd.DataFrame] = field(default_factory=dict)
    outputs: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    references: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    metrics: dict[str, pd.DataFrame] = field(default_factory=dict)
    weights: list[dict[str, Any]] = field(default_factory=list)
    world: dict[str, Any] | None = None
    agreement: dict[str, Any] | None = None
    panel: dict[str, dict[str, Any]] = field(default_factory=dict)
    sweep: list[dict[str, Any]] = field(default_factory=list)
    manifest: dict[str, Any] | None = None
    recipe: str | None = None
    labels: frozenset[str] | None = None
    problems: list[str] = field(default_factory=list)

    def has(self, label: str) -> bool:
        """Whether a label is of the recipe: the files of one that was taken out of it stay in the folder."""
        return self.labels is None or label in self.labels


@dataclass
class Board:
    """What can be compared: the models of all runs that share a task, judge, protocol, reference and orders.

    Attributes:
        task: its name.
        judge: the judge's name.
        protocol: how the judge was asked.
        reference: the reference's name.
        orders: in which the judge was asked: "one", "both" or "singly"; empty where it is not known.
        table: the rows of the leaderboard, with the column `run`.
        verdicts: with the names of `table` as generators; may be empty.
        outputs: name in `table` -> rows of outputs; may be empty.
        reference_rows: the reference's rows; may be empty.
    """

    task: str
    judge: str
    protocol: str
    reference: str
    table: pd.DataFrame
    verdicts: pd.DataFrame
    outputs: dict[str, list[dict[str, Any]]]
    reference_rows: list[dict[str, Any]]
    orders: str = ""


def write_outputs(
    folder: Path, task: str, outputs: Mapping[str, Sequence[dict[str, Any]]], reference: Sequence[dict[str, Any]]
) -> None:
    """Put the outputs that were judged where `read_run` finds them, in AlpacaEval's format.

    Args:
        folder: the folder of a run or of `otpo judge`.
        task: its name.
        outputs: label -> rows.
        reference: the reference's rows.
    """
    for label, rows in outputs.items():
        write_atomically(layout.outputs_file(folder, layout.folder_name(label), task), text_of_rows(rows))
    write_atomically(layout.reference_file(folder, task), text_of_rows(reference))


def text_of_rows(rows: Sequence[dict[str, Any]]) -> str:
    """Outputs as a file holds them: as ASCII, since one may hold half a surrogate pair, which UTF-8 cannot."""
    return json.dumps(list(rows), indent=1, default=str)


def read_run(folder: Path) -> RunFiles:
    """Read the folder of a run, a sweep or `otpo judge`.

    Raises:
        UserError: the folder does not exist, or has nothing that a report could show.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: expected the folder of a run or of `otpo judge`, found none.")
    run = RunFiles(name=folder.resolve().name)
    if (path := folder / layout.RECIPE).is_file():
        run.recipe = path.read_text(encoding="utf-8", errors="replace")
        run.labels = _labels_of(run.recipe)
    if (path := folder / layout.LEADERBOARD).is_file():
        run.board = read_leaderboard(path)
    for path in [folder / layout.VERDICTS, *sorted(folder.glob(f"{layout.JUDGE}/*/{layout.VERDICTS}"))]:
        if path.is_file():
            panel = _json(path.parent / layout.PANEL_FIGURES, run, dict)
            for task, frame in pd.read_parquet(path).groupby("task", sort=False):
                run.verdicts[str(task)] = frame.reset_index(drop=True)
                if panel and {"judges", "pairs"} <= panel.keys():
                    run.panel[str(task)] = panel
    for path in sorted(folder.glob(f"{layout.JUDGE}/*/{layout.REFERENCE}*")):
        run.references[path.parent.name] = _json(path, run, list) or []
    for path in sorted(folder.glob(f"{layout.MODELS}/*/*/{layout.OUTPUTS}*")):
        rows = _json(path, run, list) if run.has(path.parent.parent.name) else None
        if rows:  # verdicts name a model by `generator`; its folder may have another name
            label = str(rows[0].get("generator") or path.parent.parent.name)
            outputs = run.outputs.setdefault(path.parent.name, {})
            if label not in outputs or path.parent.parent.name == layout.folder_name(label):
                outputs[label] = rows
    for path in sorted(folder.glob(str(layout.label_folder(Path(), "*") / layout.METRICS))):
        if run.has(path.parent.name):
            run.metrics[path.parent.name] = _lines(path, run)
    run.weights = [row for row in _json(folder / layout.WEIGHTS, run, list) or [] if run.has(str(row.get("label")))]
    run.world = _json(folder / layout.KNOWN_TRUTH, run, dict)
    run.agreement = _json(folder / layout.AGREEMENT, run, dict)
    if run.agreement and not {"judge", "protocol", "files", "n"} <= run.agreement.keys():
        run.problems.append(f"{layout.AGREEMENT} of {run.name} is not what `otpo agreement` writes")
        run.agreement = None
    run.sweep = _json(folder / layout.SWEEP, run, list) or []
    run.manifest = _json(folder / layout.MANIFEST, run, dict)
    shown = (run.verdicts, run.metrics, run.weights, run.world, run.agreement, run.sweep, run.manifest)
    if run.board is None and not any(shown):
        raise UserError(
            f"{folder}: expected the folder of a run or of `otpo judge` (leaderboard.csv, judge/, models/) "
            f"or of `otpo agreement` (agreement.json), found {sorted(p.name for p in folder.iterdir())[:8]}."
        )
    return run


def _labels_of(recipe: str) -> frozenset[str] | None:
    """The labels of a resolved recipe, as a run writes it; None where it says none."""
    try:
        methods = (yaml.safe_load(recipe) or {}).get("methods")
    except (yaml.YAMLError, AttributeError):
        return None
    return frozenset(("base", *map(str, methods))) if isinstance(methods, dict) else None


def _json(path: Path, run: RunFiles, kind: type) -> Any:
    if not path.is_file():
        return None
    try:
        raw = path.read_bytes()
        value = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    except (OSError, ValueError) as error:
        run.problems.append(f"{path.name} of {run.name} cannot be read: {error}")
        return None
    if not isinstance(value, kind):
        run.problems.append(f"{path.name} of {run.name}: expected a {kind.__name__}, found a {type(value).__name__}")
        return None
    return value


def _lines(path: Path, run: RunFiles) -> pd.DataFrame:
    rows = []
    for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            # A killed run leaves half a line behind, and a resumed one continues after it.
            run.problems.append(f"line {n} of {path.parent.name}/{path.name} of {run.name} is not JSON")
    return pd.DataFrame(rows)


def shown_names(runs: Sequence[RunFiles]) -> dict[tuple[int, str], str]:
    """(run number, label) -> its name on the page: the label, preceded by the run's name if several runs have it."""
    labels = [_labels(run) for run in runs]
    names = [run.name for run in runs]
    shown = {}
    for i, run in enumerate(runs):
        unique = run.name if names.count(run.name) == 1 else f"{run.name} ({i + 1})"
        for label in labels[i]:
            shared = sum(label in other for other in labels) > 1
            shown[i, label] = f"{unique}/{label}" if shared else label
    return shown


def _labels(run: RunFiles) -> list[str]:
    found = [*run.metrics, *(label for outputs in run.outputs.values() for label in outputs)]
    found += [str(name) for frame in run.verdicts.values() for name in frame["generator"].unique()]
    if run.board is not None:
        found += run.board["name"].tolist()
    found += [str(row.get("label")) for row in run.weights] + list((run.world or {}).get("accuracy", {}))
    return list(dict.fromkeys(found))


def boards(runs: Sequence[RunFiles], names: Mapping[tuple[int, str], str]) -> list[Board]:
    """The boards of all runs. Those with the same task, judge, protocol, reference and orders are merged."""
    merged: dict[tuple[str, ...], list[tuple[int, pd.DataFrame]]] = {}
    for i, run in enumerate(runs):
        if run.board is not None:
            for key, table in run.board.groupby([*CONTEXT_COLUMNS, "orders"], sort=False, dropna=False):
                merged.setdefault(tuple(str(k) for k in key), []).append((i, table))
    result = []
    for (task, judge, protocol, reference, orders), parts in merged.items():
        tables, verdicts = [], []
        outputs: dict[str, list[dict[str, Any]]] = {}
        reference_rows: list[dict[str, Any]] = []
        for i, table in parts:
            run, rename = runs[i], {label: names[i, label] for label in table["name"]}
            tables.append(table.assign(name=table["name"].map(rename), run=run.name))
            rename = {label: rename[label] for label in table["name"][table["imported"] == ""]}
            if (frame := run.verdicts.get(task)) is not None:
                frame = frame[frame["generator"].isin(rename) & (frame["reference"] == reference)]
                verdicts.append(frame.assign(generator=frame["generator"].map(rename)))
            own = of_task(run.outputs, task) or {}
            outputs |= {rename[k]: rows for k, rows in own.items() if k in rename}
            found = of_task(run.references, task) or []
            if reference in own and (not found or found[0].get("generator") != reference):
                found = own[reference]  # models judged against each other
            reference_rows = reference_rows or found
        table = pd.concat(tables, ignore_index=True)
        table = table.sort_values("win_rate", ascending=False, kind="stable", ignore_index=True)
        frame = pd.concat(verdicts, ignore_index=True) if verdicts else pd.DataFrame()
        result.append(Board(task, judge, protocol, reference, table, frame, outputs, reference_rows, orders))
    return result


def of_task(found: Mapping[str, T], task: str) -> T | None:
    """What the folder of a task holds; folders of earlier versions have other names."""
    names = [layout.folder_name(task), *layout.earlier_names(task)]
    return next((found[name] for name in names if name in found), None)
