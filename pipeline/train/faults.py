"""What training does about faults: which are retried, how often, and what the user is told.

what goes wrong                           what happens
wrong input or a wrong number             not retried, since a retry would meet it again: the worker writes the
(UserError, WorkError in a worker)        failure file, and the driver raises its error
a worker, a node or its connection dies,  Ray starts the whole group again, `train.max_failures` times; every job
any other exception                       resumes from its newest complete checkpoint
the group cannot be placed                tried again about every minute, CONTROLLER_FAILURES times
Ctrl-C                                    Ray stops the workers; checkpoints stay, and the same command resumes
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray.train

from otpo.errors import UserError, WorkError
from otpo.files import write_atomically

FAILURE_FILE = "failure.json"
NOT_RETRIED = {kind.__name__: kind for kind in (UserError, WorkError)}
CONTROLLER_FAILURES = 5


def failure_config(max_failures: int) -> ray.train.FailureConfig:
    """Ray Train's part: how often a failed worker group is started again."""
    return ray.train.FailureConfig(
        max_failures=max_failures,
        controller_failure_limit=CONTROLLER_FAILURES,  # type: ignore[call-arg]  # only Ray Train v2 has it
    )


@contextmanager
def writing_failures(path: Path) -> Iterator[None]:
    """In a worker: write an error that a retry would meet again to the failure file, and raise it."""
    try:
        yield
    except tuple(NOT_RETRIED.values()) as error:
        write_atomically(path, json.dumps([type(error).__name__, str(error)]))
        raise


@contextmanager
def explained(failure: Path, *, max_failures: int, kept: Path) -> Iterator[None]:
    """In the driver, around `TorchTrainer.fit`: raise what the user is told.

    Args:
        failure: the failure file. One from an earlier attempt is removed.
        kept: the folder of the checkpoints, for the message.

    Raises:
        UserError, WorkError: what a worker wrote to the failure file, or that all retries have failed.
        KeyboardInterrupt: the user stopped the training.
    """
    failure.unlink(missing_ok=True)
    try:
        with _interruptible():
            yield
    except ray.train.TrainingFailedError as error:
        if not failure.exists():
            raise WorkError(
                f"Training failed {max_failures + 1} times; checkpoints are kept in {kept}, and the same command goes"
                f" on from them. The last failure: {_cause(error)}"
            ) from error
    if failure.exists():
        kind, message = json.loads(failure.read_text())
        raise NOT_RETRIED[kind](message)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn Ray Train's exit with code 0 on SIGINT into KeyboardInterrupt, and take away the handler that it leaves."""
    previous = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, previous)


def _cause(error: BaseException) -> str:
    """The last line of what the first failed worker raised."""
    failures = getattr(error, "worker_failures", None) or {}
    first: BaseException = next(iter(failures.values()), error)
    return str(first).strip().splitlines()[-1] if str(first).strip() else repr(first)
