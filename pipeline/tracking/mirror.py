"""Copies what a run writes into trackers: each label's `metrics.jsonl`, and the leaderboard at the end.

The files are the truth and the trackers follow them: each step is in a tracker once, even if a worker dies, the driver
is killed, or the tracker is named only after the training. All of this happens on the driver, which has the user's
environment variables with addresses and keys: workers never see them, and no training step waits for a network.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.layout import METRICS
from otpo.errors import first_line
from otpo.files import write_json
from pipeline.run.folder import LabelFolder, RunFolder
from pipeline.tracking.trackers import TRACKERS, Place, Tracker

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.recipe import Recipe

BOARD = "all models"  # no label has a space
SECONDS = 1.0  # between two looks at the files
BOARD_FIGURES = ("win_rate", "length_controlled_winrate", "length_adjusted_winrate", "avg_length", "length_ratio")


@contextmanager
def tracking(
    recipe: Recipe,
    folder: RunFolder,
    *,
    note: Callable[[str], None],
    settings: Callable[[str], dict[str, Any]] | None = None,
) -> Iterator[None]:
    """Copy a run's metrics to the recipe's trackers while the body runs, and its leaderboard at the end.

    Args:
        folder: of the run, or of a sweep, whose trials are its labels.
        note: called with a sentence where a tracker fails, which stops that tracker and nothing else.
        settings: label -> settings that the tracker shows beside it; by default those of the recipe's label.
    """
    if not recipe.tracking:
        yield
        return
    of_label = settings or (lambda label: settings_of(recipe, label))
    mirror = _Mirror(list(recipe.tracking), folder, recipe.name, of_label, note)
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(SECONDS):
            mirror.look()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        mirror.look(everything=True)
        mirror.close()
        mirror.board()


def settings_of(recipe: Recipe, label: str) -> dict[str, Any]:
    """What a tracker shows of a label: its model, data, method and training. No judge, and so no address or key."""
    supervised = label not in recipe.methods
    return {
        "model": recipe.model.model_dump(mode="json"),
        "data": {"path": (recipe.base or {}).get("data")} if supervised else recipe.data.model_dump(mode="json"),
        "method": {} if supervised else recipe.method(label).settings,
        "train": recipe.train_of(label).model_dump(mode="json"),
    }


def tracker_names(line: dict[str, Any]) -> dict[str, float]:
    """A line of `metrics.jsonl` under the names of TRL users' charts: `train/loss`, `eval/rewards/margins`, ..."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": float(value)
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float)
    }


def board_figures(board: pd.DataFrame) -> dict[str, float]:
    """The main figures of a leaderboard as `board/<task>/<model>/<figure>`."""
    several = board.duplicated(["task", "name"], keep=False)
    found = {}
    for row, ambiguous in zip(board.to_dict("records"), several, strict=True):
        name = f"{row['name']} against {row['reference']}" if ambiguous else row["name"]
        for figure in BOARD_FIGURES:
            value = row.get(figure)
            if isinstance(value, int | float) and math.isfinite(value):
                found[f"board/{row['task']}/{name}/{figure}"] = float(value)
    return found


@dataclass
class _Mirror:
    """All labels of a run."""

    names: list[str]
    folder: RunFolder
    project: str
    settings: Callable[[str], dict[str, Any]]
    note: Callable[[str], None]

    def __post_init__(self) -> None:
        self.labels: dict[str, _Label] = {}
        self.before = {source: _signature(source) for source in self._sources()}

    def _sources(self) -> list[Path]:
        return sorted(self.folder.models.glob(f"*/{METRICS}"))

    def look(self, *, everything: bool = False) -> None:
        """Copy what is new of the trainings of this call; with `everything`, also what earlier calls left.

        What earlier calls left waits for the end: until then a stage that is done again may delete it.
        """
        for source in self._sources():
            label = source.parent.name
            if label not in self.labels:
                if not everything and _signature(source) == self.before.get(source):
                    continue  # of an earlier call
                self.labels[label] = _Label(self, self.folder.label(label), over=everything)
            with suppress(FileNotFoundError):  # a stage that is done again has just deleted it
                self.labels[label].look()

    def close(self) -> None:
        """Finish what is still open."""
        for label in self.labels.values():
            label.close()

    def board(self) -> None:
        """Copy the leaderboard where it is new to a tracker."""
        path = self.folder.leaderboard
        if not path.exists():
            return
        from eval.board.leaderboard import read_leaderboard

        known = _Known(self.folder.tracking / "leaderboard.json")
        board, content = read_leaderboard(path), hashlib.sha256(path.read_bytes()).hexdigest()
        figures = board_figures(board)
        for name in list(self.names):
            if known.mark(name) == content:
                continue
            with self.trying(name):
                tracker = self.open(name, BOARD, {}, known)
                step = max((tracker.last_step(figure) for figure in figures), default=-1) + 1
                tracker.log(step, figures)
                tracker.log_table(step, "leaderboard", board)
                tracker.finish(failed=False)
                known.finished(name, content)

    def open(self, name: str, label: str, config: dict[str, Any], known: _Known) -> Tracker:
        """Open a tracker, and remember its run for a later process."""
        place = Place(self.project, label, self.folder.tracking, config, known.run(name))
        tracker = TRACKERS[name](place)
        known.opened(name, tracker.run)
        return tracker

    @contextmanager
    def trying(self, name: str) -> Iterator[None]:
        """Give up on a tracker that fails, rather than on the run."""
        try:
            yield
        except Exception as error:  # each product has errors of its own
            if name in self.names:
                self.names.remove(name)
            reason = first_line(error)
            self.note(
                f"tracking: {name} failed and got nothing more: {reason:.300}. metrics.jsonl has everything; the same"
                " command tries again."
            )


class _Label:
    """One training: its file, as far as it was read, and the trackers that hold it."""

    def __init__(self, mirror: _Mirror, folder: LabelFolder, *, over: bool):
        self.mirror, self.folder = mirror, folder
        self.known = _Known(folder.tracking)
        self.trackers: dict[str, Tracker] = {}
        self.inode, self.read, self.lines = -1, 0, 0
        # a training that is over may be in the trackers already
        whole = folder.metrics.read_bytes().count(b"\n") if over else -1
        self.names = [name for name in mirror.names if self.known.mark(name) != whole]
        self.done = not self.names

    @property
    def trained(self) -> bool:
        """Whether the model is there."""
        return self.folder.model.exists()

    def look(self) -> None:
        """Copy the new lines."""
        if self.done:
            return
        trained = self.trained  # asked before reading: no line comes after the model
        for line in self._new_lines():
            self._log(line)
        for name, tracker in self.trackers.items():
            if name in self.mirror.names:
                with self.mirror.trying(name):
                    tracker.flush()
        if trained:
            self.close()
            self.done = True

    def close(self) -> None:
        """Finish the trackers."""
        for name, tracker in self.trackers.items():
            if name in self.mirror.names:
                with self.mirror.trying(name):
                    tracker.finish(failed=not self.trained)
                    self.known.finished(name, self.lines)
        self.trackers = {}

    def _new_lines(self) -> list[dict[str, Any]]:
        with self.folder.metrics.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self.inode:
                # training has resumed from a checkpoint and rewritten the file: open every tracker again
                self.close()
                self.inode, self.read, self.lines = inode, 0, 0
            file.seek(self.read)
            whole, _, _ = file.read().rpartition(b"\n")
        if not whole:
            return []
        self.read += len(whole) + 1
        texts = whole.split(b"\n")
        self.lines += len(texts)
        return [json.loads(text) for text in texts]

    def _log(self, line: dict[str, Any]) -> None:
        metrics, step = tracker_names(line), line["step"]
        for name in [name for name in self.names if name in self.mirror.names]:
            with self.mirror.trying(name):
                if name not in self.trackers:
                    label = self.folder.path.name
                    self.trackers[name] = self.mirror.open(name, label, self.mirror.settings(label), self.known)
                tracker = self.trackers[name]
                new = {metric: value for metric, value in metrics.items() if step > tracker.last_step(metric)}
                if new:
                    tracker.log(step, new)


def _signature(path: Path) -> tuple[int, int, int] | None:
    with suppress(FileNotFoundError):
        found = path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns
    return None


class _Known:
    """A small file that says which run of each tracker holds a training, and how much of it once it is finished."""

    def __init__(self, path: Path):
        self.path = path

    def _tree(self) -> dict[str, dict[str, Any]]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def run(self, name: str) -> str | None:
        """The tracker's run, if one was opened before."""
        return self._tree().get(name, {}).get("run")

    def mark(self, name: str) -> Any:
        """What `finished` was told."""
        return self._tree().get(name, {}).get("holds")

    def opened(self, name: str, run: str) -> None:
        """Remember the run."""
        write_json(self.path, self._tree() | {name: {"run": run}})

    def finished(self, name: str, holds: Any) -> None:
        """Remember what it holds."""
        tree = self._tree()
        write_json(self.path, tree | {name: tree[name] | {"holds": holds}})
