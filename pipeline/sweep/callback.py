"""What Ray Tune tells about the trials while they run."""

from __future__ import annotations

import time
from typing import Any

from ray import tune

from pipeline.progress import Progress
from pipeline.run.metrics import newest_step
from pipeline.sweep.trials import FAILED, RUNNING, STOPPED, TrialSettings, on_the_way, trial_records, write_trial


class SweepCallback(tune.Callback):
    """Shows how far the running trials are, and ends the records of those that could not do so themselves."""

    def __init__(self, settings: TrialSettings, progress: Progress):
        self.settings, self.progress = settings, progress
        self.shown, self.ended = 0.0, 0

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
        """Count it. One that is still running is stopped by ASHA now."""
        self._end(trial, {"state": STOPPED})

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count it: only a trial whose process died, more often than it is started again, comes here."""
        error = "the trial's process died; `ray logs` or dmesg may say why (out of memory?)"
        self._end(trial, {"state": FAILED, "error": error})

    def _end(self, trial: Any, end: dict[str, Any]) -> None:
        self.ended += 1
        search = self.settings.search
        what = f"trials of {search.label}" if search.of_several else "trials"
        self.progress(what, self.ended, search.n_trials, "")
        for record in trial_records(self.settings):
            if record["tune"] == trial.trial_id and record["state"] == RUNNING:
                folder = self.settings.folder.label(record["name"])
                # training and judging went on until Tune had decided by its last report
                last = trial.last_result.get("step", 0)
                reported = [each for each in on_the_way(self.settings, folder) if each["step"] <= last]
                seconds = record["before"] + time.time() - record["started"]
                figures = reported[-1] if reported else {}
                write_trial(folder, record | end | {"figures": figures, "seconds": seconds})
