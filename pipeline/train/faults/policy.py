"""Which faults of training are retried, how often, and what the user is told at the end."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray.exceptions
import ray.train

from otpo.errors import LastingError, UserError, WorkError
from otpo.files import write_atomically
from pipeline.train.faults.causes import cause, cause_of, sentence
from pipeline.train.faults.controller import ATTEMPTS_FILE

FAILURE_FILE = "failure.json"
SEEN_FILE = "seen_failures.json"
NOT_RETRIED = {"UserError": UserError, "WorkError": LastingError}  # a worker's error -> the driver's
PLACEMENT_SECONDS = 30.0  # that Ray looks for room at a time


def failure_config(max_failures: int, *, wait_seconds: float) -> ray.train.FailureConfig:
    """Ray Train's part: how often a failed worker group is started again, and how long it looks for room for one."""
    return ray.train.FailureConfig(
        max_failures=max_failures,
        controller_failure_limit=math.ceil(wait_seconds / PLACEMENT_SECONDS),  # type: ignore[call-arg]  # v2's
    )


@contextmanager
def ray_train_limits(*, silent_seconds: float) -> Iterator[None]:
    """Set, for the body, the limits that Ray Train reads from the environment."""
    limits = {
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(silent_seconds),
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(PLACEMENT_SECONDS),
    }
    before = {name: os.environ.get(name) for name in limits}
    os.environ.update({name: value for name, value in limits.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)


@contextmanager
def writing_failures(path: Path) -> Iterator[None]:
    """In a worker: write an error that a retry would meet again to the failure file, and raise it."""
    try:
        yield
    except (UserError, WorkError) as error:
        kind = UserError if isinstance(error, UserError) else WorkError
        write_atomically(path, json.dumps([kind.__name__, str(error)]))
        raise
    except Exception as error:
        if told := _will_come_again(error) or _came_again(error, path.with_name(SEEN_FILE)):
            write_atomically(path, json.dumps([WorkError.__name__, told]))
        raise


def _will_come_again(error: Exception) -> str | None:
    """What to tell about an error that the same rows on the same machine cause every time; None for any other."""
    text = _chain(error)
    if re.search(r"No space left on device|os error 28\b|Disk quota exceeded", text):
        return (
            f"{_place(error)}The disk is full: {_line(error)}. Free some space, or keep fewer checkpoints"
            " (train.keep_checkpoints); the same command goes on from the newest one."
        )
    if re.search(r"index out of range|device-side assert", text):
        return (
            f"{_place(error)}An index is out of range: {_line(error)}. A token id is beyond the model's vocabulary, or"
            " a text longer than its positions: compare the tokenizer with the model's config.json, and lower"
            " data.max_length."
        )
    return None


def _came_again(error: Exception, seen: Path) -> str | None:
    """What to tell about an error that an earlier attempt met at the same step; remembers any other.

    Errors of a connection do not count: a worker raises them when another one, or its machine, has died. The hub's do:
    its client says that it cannot connect where a name is no model.
    """
    text = _chain(error)
    lost = re.search(r"gloo|nccl|connection|broken pipe|timed out|timeout|Dist\w*Error", text, re.IGNORECASE)
    if lost and not re.search(r"huggingface|hf\.co", text, re.IGNORECASE):
        return None
    signature = f"{_place(error)}{type(error).__name__}: {re.sub('[0-9.]+', '#', _line(error))}"
    before: list[str] = json.loads(seen.read_text()) if seen.exists() else []
    if signature not in before:
        write_atomically(seen, json.dumps([*before, signature]))
        return None
    if re.search(r"out of memory|can't allocate memory|not enough memory", _chain(error), re.IGNORECASE):
        advice = (
            "Lower train.micro_batch_tokens or train.micro_batch_size, which changes no result, set"
            " train.activation_checkpointing=true, take more workers, or lower data.max_length."
        )
    else:
        advice = "It is not tried a third time; checkpoints are kept, and the same command goes on from them."
    return f"{_place(error)}The same failure came twice: {type(error).__name__}: {_line(error)}. {advice}"


def _place(error: BaseException) -> str:
    """Where training was, as the worker noted on the error."""
    return "".join(f"{note}: " for note in getattr(error, "__notes__", [])[:1])


def _line(error: BaseException) -> str:
    """The first line of an error's message."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else repr(error)).rstrip(".")


def _chain(error: BaseException | None) -> str:
    """The messages of an error and of those that caused it: checkpoints and exports wrap what the disk said."""
    texts = []
    while error is not None:
        texts.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


@contextmanager
def explained(failure: Path, *, wait_seconds: float, kept: Path) -> Iterator[None]:
    """In the driver, around `TorchTrainer.fit`: raise what the user is told.

    Args:
        failure: the failure file. What earlier attempts left beside it is removed.
        wait_seconds: how long room for the workers was looked for.
        kept: the folder of the checkpoints, for the message.

    Raises:
        UserError, LastingError: what a worker wrote to the failure file. WorkError: all retries have failed.
        KeyboardInterrupt: the user stopped the training.
    """
    attempts = failure.with_name(ATTEMPTS_FILE)
    for file in (failure, failure.with_name(SEEN_FILE), attempts):
        file.unlink(missing_ok=True)
    try:
        with _interruptible():
            yield
    except ray.train.TrainingFailedError as error:
        if not failure.exists():
            causes: list[str] = json.loads(attempts.read_text()) if attempts.exists() else []
            raise WorkError(_ended(error, causes, wait_seconds) + _what_is_kept(kept)) from error
    except ray.exceptions.RayError as error:  # of the controller itself, which has no one above it to start it again
        if not failure.exists():
            found = cause("the process that leads training (Ray Train's controller)", str(error))
            raise WorkError(sentence(found) + _what_is_kept(kept)) from error
    if failure.exists():
        kind, message = json.loads(failure.read_text())
        raise NOT_RETRIED[kind](message)


def _ended(error: ray.train.TrainingFailedError, causes: list[str], wait_seconds: float) -> str:
    """Why training ended, after how many attempts."""
    if isinstance(error, ray.train.WorkerGroupError):
        last = causes[-1] if causes else cause_of(error.worker_failures, {}).text
        times = f"failed {len(causes)} times; the last time" if len(causes) > 1 else "failed:"
        return f"Training {times} {last}."
    if isinstance(error, ray.train.ControllerError) and "startup timed out" in str(error):
        earlier = f" Before that, {causes[-1]}." if causes else ""
        return (
            f"Training ended because the cluster had no room for its workers for {wait_seconds / 60:g} minutes"
            f" (cluster.node_wait_minutes).{earlier} Add the missing nodes, or lower train.workers."
        )
    return f"Training failed: {_line(error)}."


def _what_is_kept(kept: Path) -> str:
    """What the same command would do, which depends on what is there."""
    if any(kept.glob("*/checkpoints/step-*/complete.json")):
        return f" Checkpoints are kept in {kept}, and the same command goes on from them."
    return " No checkpoint was saved yet: the same command starts the unfinished label anew."


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
