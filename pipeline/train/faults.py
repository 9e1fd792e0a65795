"""What training does about faults: which are retried, how often, and what the user is told.

what goes wrong                           what happens
wrong input or a wrong number             not retried, since a retry would meet it again: the worker writes the
(UserError, WorkError in a worker)        failure file, and the driver raises its error
a full disk, an index out of range        the same
any other exception, out of memory too    Ray starts the whole group again; where the same exception comes at the same
                                          step, it is not retried any more
a worker, a node or its connection dies   Ray starts the whole group again, `train.max_failures` times; every job
                                          resumes from its newest complete checkpoint
the group cannot be placed                tried again about every minute, CONTROLLER_FAILURES times
Ctrl-C                                    Ray stops the workers; checkpoints stay, and the same command resumes
"""

from __future__ import annotations

import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray.train

from otpo.errors import UserError, WorkError
from otpo.files import write_atomically

FAILURE_FILE = "failure.json"
SEEN_FILE = "seen_failures.json"
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
    failure.with_name(SEEN_FILE).unlink(missing_ok=True)
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
