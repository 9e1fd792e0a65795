"""Milestones of a training: models exported on the way, judged while training goes on.

models/<label>/milestones/step-N/     a folder as any label's: model/ while something reads it, outputs, verdicts
                          judged.json step, the exported model's hash, its row of the board
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

from otpo.errors import LastingError, WorkError
from otpo.files import write_json
from pipeline.run.folder import LabelFolder


def is_milestone(step: int, every: int | None, total: int) -> bool:
    """Whether the model is exported after a step. After the last one it is the trained model."""
    return every is not None and step % every == 0 and step < total


def note_judged(
    folder: LabelFolder, step: int, model_sha256: str, figures: dict[str, Any], *, keeps_weights: bool
) -> None:
    """Note a milestone's row of the board.

    Args:
        folder: of the milestone.
        model_sha256: of the model that was judged, as its `generation.json` has it.
        keeps_weights: whether something will read the model again.
    """
    write_json(folder.judged, {"step": step, "model_sha256": model_sha256, "figures": figures})
    if not keeps_weights:
        for path in (folder.model, folder.adapter):
            shutil.rmtree(path, ignore_errors=True)


def read_judged(folder: LabelFolder) -> dict[str, Any]:
    """The row of the board of a judged milestone, with its `step`."""
    found = json.loads(folder.judged.read_text())
    return found["figures"] | {"step": found["step"]}


def judged_milestones(label: LabelFolder) -> list[dict[str, Any]]:
    """The figures of a label's judged milestones, each with its `step`, in order."""
    return [read_judged(folder) for _, folder in label.milestones() if folder.judged.exists()]


def forget_milestones(label: LabelFolder) -> None:
    """Remove a label's milestones, which were judged otherwise than they would be now."""
    for _, folder in label.milestones():
        shutil.rmtree(folder.path)


class TrialMilestones:
    """The milestones of a trial while it trains: each is queued once it is exported, and reported when it is judged.

    Reports come in the order of the steps, whichever figures are there first.

    Args:
        label: the trial's folder.
        name: of the trial.
        queue: handle of a `JudgingQueue`.
        report: called with the figures of a milestone and its `step`.
    """

    def __init__(self, label: LabelFolder, name: str, queue: Any, report: Callable[[dict[str, Any]], None]):
        self.label, self.name, self.queue, self.report = label, name, queue, report
        self.asked: dict[int, Any] = {}
        self.reported = 0

    def advance(self, *, wait: bool = False) -> None:
        """Queue what is new, and report what is judged.

        Args:
            wait: until all that is queued is judged.

        Raises:
            WorkError, LastingError: a milestone could not be judged.
        """
        waiting = [(step, folder) for step, folder in self.label.milestones() if step > self.reported]
        for step, folder in waiting:
            if step not in self.asked and not folder.judged.exists() and folder.model.exists():
                self.asked[step] = self.queue.judged.remote(self.name, None, step)
        for step, folder in waiting:
            figures = self._figures(step, folder, wait=wait)
            if figures is None:
                return
            self.reported = step
            self.report(figures | {"step": step})

    def _figures(self, step: int, folder: LabelFolder, *, wait: bool) -> dict[str, Any] | None:
        import ray

        if step not in self.asked:
            return read_judged(folder) if folder.judged.exists() else None
        if not wait and not ray.wait([self.asked[step]], timeout=0)[0]:
            return None
        judged = ray.get(self.asked[step])
        if "error" in judged:
            raise (LastingError if judged["lasting"] else WorkError)(f"milestone of step {step}: {judged['error']}")
        return judged
