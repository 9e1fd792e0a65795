"""When a training saves a checkpoint, every so many steps or minutes, and what follows once it is complete."""

from __future__ import annotations

import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import ray.train
import torch

from otpo.models.checkpoint import CheckpointWriter, prune_checkpoints
from otpo.ranks import from_rank_0, rank
from otpo.training.objectives import TrainedModel
from pipeline.recipe import TrainConfig
from pipeline.recipe.sections import SAVING_SHARE
from pipeline.train.job import TrainJob

MEASURED = 2  # steps that are timed before the first interval is chosen; the one before them is slower than the rest


class SaveSchedule:
    """The steps after which all ranks save.

    An interval in minutes becomes one in steps, by rank 0's clock: the ranks agree once for each checkpoint, and not
    after each step, which would make them wait for each other. Training waits for saving at most a twentieth of the
    time; what is written beside it does not count.

    Args:
        every: steps between checkpoints; None goes by `minutes`.
        minutes: between checkpoints; None for no checkpoints.
        start: the step that training starts after.
    """

    def __init__(self, every: int | None, minutes: float | None, *, start: int) -> None:
        self.every, self.minutes = every, None if every else minutes
        self.next: int | None = None
        self.measured = start + 1 + MEASURED
        self.ended: list[float] = []
        self.saving = 0.0

    def due(self, step: int) -> bool:
        """Whether to save after `step`. Every rank must call it after every step, before anything else is done."""
        if self.every:
            return step % self.every == 0
        if self.minutes is None:
            return False
        self.ended = [*self.ended[-MEASURED:], time.monotonic()]
        if step == self.measured:
            self._choose(step)
        return step == self.next

    def saved(self, step: int, seconds: float) -> None:
        """Note that all ranks have saved after `step`, and how long training waited; the next interval begins."""
        if self.minutes is None:
            return
        self.saving = seconds
        if len(self.ended) > 1:
            self._choose(step)
        self.ended = [time.monotonic()]

    def _choose(self, step: int) -> None:
        self.next = step + from_rank_0(self._steps())

    def _steps(self) -> int:
        """Steps that take as long as an interval."""
        assert self.minutes is not None
        step = median(after - before for before, after in pairwise(self.ended))
        return max(1, round(max(60 * self.minutes, SAVING_SHARE * self.saving) / max(step, 1e-6)))


class Saving:
    """The checkpoints of one job on this rank: when they are saved, which are kept, what Ray is told.

    Every rank must call it alike, but for `check`. Only a complete checkpoint lets older ones go and is reported.

    Args:
        start: the step that training starts after.
    """

    def __init__(
        self,
        job: TrainJob,
        train: TrainConfig,
        model: TrainedModel,
        optimizer: torch.optim.Optimizer,
        writer: CheckpointWriter,
        *,
        start: int,
    ) -> None:
        self.job, self.keep, self.model, self.optimizer, self.writer = (
            job, train.keep_checkpoints, model, optimizer, writer,
        )  # fmt: skip
        self.schedule = SaveSchedule(train.save_every, train.save_minutes, start=start)
        self.state: dict[str, Any] = {"step": 0}

    def due(self, step: int) -> bool:
        """As `SaveSchedule.due`."""
        return self.schedule.due(step)

    def check(self) -> None:
        """Raise what has gone wrong in the background by now."""
        self.writer.check()

    def save(self, step: int, best: dict[str, Any]) -> None:
        """Save after `step`, unless that is done; wait for the checkpoint before, if it is still being written."""
        if step == self.state["step"]:
            return  # already saved as the best one
        started = time.perf_counter()
        self.finish()
        self.state = {
            "step": step,
            "best": best,
            "reference": self.job.model_fingerprint,
            "label": self.job.label,
            "world": torch.distributed.get_world_size(),
        }
        self.writer.save(self.job.folder.checkpoints, self.model, self.optimizer, self.state)
        self.schedule.saved(step, time.perf_counter() - started)
        if not self.writer.background:
            self.finish()

    def finish(self) -> None:
        """Wait until the newest checkpoint is complete; delete those that are not kept, and report it."""
        path = self.writer.wait()
        if path is None:
            return
        if rank() == 0:
            # the best as it was then: a better one may be on its way, and is not complete
            prune_checkpoints(self.job.folder.checkpoints, self.keep, self.state["best"]["step"])
        self._report(path)

    def _report(self, path: Path) -> None:
        """Report to Ray. Its checkpoint only points at ours: the shards already lie on the run's own storage."""
        label, step = self.job.label, self.state["step"]
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if rank() == 0:
                pointer = {"path": str(path), "label": label, "step": step}
                (Path(folder) / "pointer.json").write_text(json.dumps(pointer))
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"label": label, "step": step}, checkpoint=checkpoint)
