"""In Ray Train's controller: what happens to the worker group, said as it happens."""

from __future__ import annotations

import json
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import ray.train
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from otpo.files import write_atomically
from pipeline.events.log import record
from pipeline.train.faults.causes import Cause, cause_of, sentence

ATTEMPTS_FILE = "attempts.json"
SILENT_SECONDS = 20.0  # without a response, after which a rank is named


class GroupEvents(ControllerCallback, WorkerGroupCallback):
    """Writes an event for each failure, wait and new start of the worker group, and keeps the causes of failures.

    Ray Train's own callback for users hears of exceptions alone; these two classes are open to developers.

    Args:
        events: the run's `events.jsonl`. about: what its events are about.
        failure: the failure file (`pipeline.train.faults.policy`), for what is not to be tried again. `attempts.json`
            beside it lists why each attempt ended.
        max_failures: how often a failed group is started again.
        silent_seconds: after which Ray gives up a rank that does not respond.
        wait_seconds: after which Ray gives up finding room for the group.
    """

    def __init__(
        self, events: Path, about: str, failure: Path, *, max_failures: int, silent_seconds: float, wait_seconds: float
    ) -> None:
        self.events, self.about, self.failure = events, about, failure
        self.max_failures = max_failures
        self.silent_seconds, self.wait_seconds = silent_seconds, wait_seconds
        self.group: Any = None
        self.places: dict[int, str] = {}
        self.causes: list[Cause] = []
        self.silent: dict[int, float] = {}
        self.waiting = False  # for room
        self.workers = 0  # of the group before

    # ---- the worker group ----

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Note where each rank runs; say so when the group was started again."""
        self.group, self.silent = worker_group, {}
        self.places = {
            rank: f"process {worker.metadata.pid} on {worker.metadata.node_ip}"
            for rank, worker in enumerate(worker_group.get_workers())
        }
        if self.causes or self.waiting or self.workers not in (0, len(self.places)):
            self._tell(f"started again with {len(self.places)} worker{'s' if len(self.places) > 1 else ''}")
        self.workers = len(self.places)
        self.waiting = False

    def after_worker_group_poll_status(self, worker_group_status: Any) -> None:
        """Name ranks that do not respond, once each."""
        pending = getattr(self.group, "_world_rank_to_ongoing_poll", {})
        now = time.monotonic()
        self.silent = {rank: self.silent.get(rank, now) for rank in pending}
        for rank, since in self.silent.items():
            if now - since < SILENT_SECONDS or since == float("inf"):
                continue
            self.silent[rank] = float("inf")  # said
            self._tell(
                f"rank {rank} ({self.places.get(rank, 'unknown')}) has not responded for {SILENT_SECONDS:.0f} s; the"
                f" others wait for it. It is given up at {_clock(self.silent_seconds - SILENT_SECONDS)}"
                " (cluster.silent_minutes)"
            )

    # ---- the controller ----

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Say why a group ended, and what is waited for."""
        kind = current_state._state_type.name
        error = getattr(current_state, "training_failed_error", None)
        if kind == "PREEMPTING":
            self._tell("a node will be taken away; the workers save, and start again where there is room")
        elif kind == "RESIZING":
            self._tell("the nodes have room for another number of workers; they start again from the last checkpoint")
        elif kind in ("RESTARTING", "ERRORED") and isinstance(error, ray.train.WorkerGroupError):
            self._failed(cause_of(error.worker_failures, self.places), again=kind == "RESTARTING")
        elif kind == "RESCHEDULING" and not self.waiting:
            self.waiting = True
            self._tell(
                "there is no room for all training workers; they start when there is, and are given up at"
                f" {_clock(self.wait_seconds)} (cluster.node_wait_minutes)"
            )

    def _failed(self, cause: Cause, *, again: bool) -> None:
        self.causes.append(cause)
        write_atomically(self.failure.with_name(ATTEMPTS_FILE), json.dumps([cause.text for cause in self.causes]))
        if cause.kind == "memory" and not self.failure.exists():
            write_atomically(self.failure, json.dumps(["WorkError", sentence(cause)]))
        if self.failure.exists():
            return  # the message at the end says it
        text = cause.text
        if again:
            text += f"; the workers start again (restart {len(self.causes)} of at most {self.max_failures})"
        self._tell(text)

    def _tell(self, text: str) -> None:
        record(self.events, self.about, text)


def _clock(seconds: float) -> str:
    """The time of day after so many seconds."""
    return f"{datetime.now() + timedelta(seconds=max(0.0, seconds)):%H:%M:%S}"
