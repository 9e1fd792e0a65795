"""In the workers: which milestone of a training becomes its model, by what a judge says of each.

The driver judges (`pipeline.milestones.selection`) while training goes on, and leaves each milestone's figures in its
folder; that is how the two speak, as they do of everything else. Ray Train's validation hook would judge in a task of
its own: it would have neither the driver's engine nor its judge's store and budget, and its figures go to the
controller, not to the training loop, which is to stop by them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from typing import Any

from otpo.errors import WorkError
from otpo.files import write_json
from otpo.ranks import barrier, from_rank_0, rank
from pipeline.run.folder import LabelFolder

WAIT_SECONDS = 1.0  # between two looks whether all milestones are judged

Best = dict[str, Any]
"""The best milestone so far: value, step, `since` (judged ones after it), `seen` (the last step looked at)."""


class JudgedChoice:
    """Chooses among the milestones of a label. All ranks must call it alike: what rank 0 sees holds for all.

    Args:
        label: the label's folder.
        metric: of a board's row. mode: "min" or "max".
    """

    def __init__(self, label: LabelFolder, metric: str, mode: str):
        self.label, self.metric, self.mode = label, metric, mode

    def look(self, best: Best) -> Best:
        """`best` with the milestones that were judged since it was looked for; does not wait for others.

        Raises:
            WorkError: one could not be judged.
        """
        found: list[dict[str, Any]] = from_rank_0(self._judged_after(best.get("seen", 0)))
        for each in found:
            best = self._with(best, each)
        if rank() == 0:
            self._remove_weights(best)
        return best

    def settle(self, best: Best) -> Best:
        """`look`, once every milestone is judged."""
        while True:
            best = self.look(best)
            if from_rank_0(all(folder.judged.exists() for _, folder in self.label.milestones())):
                return self.look(best)
            time.sleep(WAIT_SECONDS)

    def take(self, best: Best) -> None:
        """Make the best milestone the label's model, and note where it comes from."""
        if rank() == 0:
            chosen = self.label.milestone(best["step"])
            said = {"metric": self.metric, "mode": self.mode, **{name: best[name] for name in ("step", "value")}}
            said["model_sha256"] = json.loads(chosen.judged.read_text())["model_sha256"]
            write_json(self.label.selected, said)
            for source, target in ((chosen.adapter, self.label.adapter), (chosen.model, self.label.model)):
                if source.exists():
                    shutil.rmtree(target, ignore_errors=True)
                    os.replace(source, target)
        barrier()

    def _judged_after(self, step: int) -> list[dict[str, Any]]:
        """The judged milestones after a step, up to the first that is not judged yet: in order, whenever one looks."""
        found: list[dict[str, Any]] = []
        for at, folder in self.label.milestones():
            if at > step:
                if not folder.judged.exists():
                    break
                found.append(json.loads(folder.judged.read_text()))
        return found

    def _with(self, best: Best, judged: dict[str, Any]) -> Best:
        where = f"{self.label.path.name}, milestone of step {judged['step']}"
        if "error" in judged:
            raise WorkError(f"{where}: {judged['error']}. The same command judges it again.")
        value = judged["figures"].get(self.metric)
        if value is None:
            names = ", ".join(sorted(name for name, figure in judged["figures"].items() if figure is not None))
            raise WorkError(f"{where}: train.best_metric is '{self.metric}', but the board gives: {names}.")
        better = best["value"] is None or (value < best["value"] if self.mode == "min" else value > best["value"])
        if better:
            return {"value": value, "step": judged["step"], "since": 0, "seen": judged["step"]}
        return best | {"since": best["since"] + 1, "seen": judged["step"]}

    def _remove_weights(self, best: Best) -> None:
        """Remove the weights of milestones that are judged and not the best."""
        for step, folder in self.label.milestones():
            if step <= best.get("seen", 0) and step != best["step"]:
                for path in (folder.model, folder.adapter):
                    shutil.rmtree(path, ignore_errors=True)
