"""What Ray Tune tells about the trials while they run."""

from __future__ import annotations

import time
from typing import Any

from ray import tune

from pipeline.progress import Progress
from pipeline.run.metrics import newest_step
from pipeline.sweep.trials import FAILED, RUNNING, STOPPED, Evaluations, TrialSettings, trial_records, write_trial


class SweepCallback(tune.Callback):
    """Shows how far the running trials are, and ends the records of those that could not do so themselves."""

    def __init__(self, settings: TrialSettings, progress: Progress):
        self.settings, self.progress = settings, progress
        self.shown, self.ended, self.died = 0.0, 0, set[str]()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles callbacks for a restore that a sweep has no use for, and a terminal cannot travel."""
        return {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called by Tune several times a second."""
        if time.monotonic() - self.shown < 1:
            return
        self.shown = time.monotonic()
        for record in trial_records(self.settings):
            line = newest_step(self.settings.folder.label(record["name"]).metrics)
            if record["state"] == RUNNING and line:
                remark = f"loss {line['loss']:.4f}"
                self.progress(f"train {record['name']}", line["step"], record["total_steps"], remark)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count it."""
        self.ended += 1
        self.progress("trials", self.ended, self.settings.search.n_trials, "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Remember it: only a trial whose process died comes here."""
        self.died.add(trial.trial_id)
        self.on_trial_complete(iteration, trials, trial)

    def settle(self) -> None:
        """End the records of trials that ASHA stopped or whose process died."""
        for record in trial_records(self.settings):
            if record["state"] != RUNNING:
                continue
            folder = self.settings.folder.label(record["name"])
            evaluations = Evaluations(folder.metrics).new()
            end = {"state": STOPPED, "figures": evaluations[-1] if evaluations else {}}
            if record["tune"] in self.died:
                error = "the trial's process died; `ray logs` or dmesg may say why (out of memory?)"
                end = {"state": FAILED, "error": error}
            write_trial(folder, record | end | {"seconds": time.time() - record["started"]})
