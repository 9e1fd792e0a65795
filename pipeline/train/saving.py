"""When a training saves a checkpoint: every so many steps, or every so many minutes."""

from __future__ import annotations

import time
from itertools import pairwise
from statistics import median

from otpo.ranks import from_rank_0
from pipeline.recipe.sections import SAVING_SHARE

MEASURED = 2  # steps that are timed before the first interval is chosen; the one before them is slower than the rest


class SaveSchedule:
    """The steps after which all ranks save.

    An interval in minutes becomes one in steps, by rank 0's clock: the ranks agree once for each checkpoint, and not
    after each step, which would make them wait for each other. Saving takes at most a twentieth of the time.

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
        """Note that all ranks have saved after `step`, and how long it took; the next interval begins."""
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
