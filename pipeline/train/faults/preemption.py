"""Nodes that are taken away after a notice, as spot instances are: the workers save and leave before it happens."""

from __future__ import annotations

import json
from pathlib import Path

import ray.train

from otpo.files import write_atomically
from otpo.ranks import from_rank_0, rank

LEFT_FILE = "left.json"
NOTICE_SECONDS = 5.0  # between two questions whether there is a notice; Ray looks as often


class Notices:
    """Whether a node of this worker group is about to be taken away. Every rank must ask after every step."""

    def __init__(self) -> None:
        self.steps = 0
        self.every: int | None = None

    def imminent(self, step_seconds: float) -> bool:
        """Whether there is a notice; asked of Ray, which all ranks do together, every few seconds only.

        Args:
            step_seconds: how long the last step took.
        """
        self.steps += 1
        if self.steps == 2:  # the first step is slower than the rest
            self.every = from_rank_0(max(1, round(NOTICE_SECONDS / max(step_seconds, 1e-6))))
        if self.every is None or self.steps % self.every:
            return False
        return ray.train.get_preemption_info() is not None


class Leaving(Exception):
    """Ends the work of a rank that has saved because its group's node is taken away."""


def leave(folder: Path, step: int) -> None:
    """Note for the driver that the group leaves after `step`, and end this rank's work.

    Raises:
        Leaving: always.
    """
    if rank() == 0:
        write_atomically(folder / LEFT_FILE, json.dumps({"step": step}))
    raise Leaving


def has_left(folder: Path) -> bool:
    """In the driver: whether the group that has ended left because of a notice. Asked once for each group."""
    file = folder / LEFT_FILE
    left = file.exists()
    file.unlink(missing_ok=True)
    return left
