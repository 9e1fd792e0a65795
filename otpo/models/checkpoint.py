"""Sharded checkpoints to resume from.

    models/<label>/checkpoints/step-000100/   every rank's shards (torch DCP), then `complete.json`, written last

A checkpoint without `complete.json` was interrupted while it was written; nothing reads it. `complete.json` also has
the size and the SHA-256 of every file, so that a shard that was cut, lost or changed later is found and not loaded.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from otpo.errors import WorkError
from otpo.files import write_atomically
from otpo.models.policy import PolicyModel
from otpo.models.reward_model import RewardModel
from otpo.ranks import barrier, from_rank_0, of_all_ranks, rank, world_size

MARK = "complete.json"
METADATA = ".metadata"  # torch's table of what stands in which shard
FILES = "files"  # in it: file -> [bytes, SHA-256]
TORN = "torn-"  # before the name of a checkpoint that was set aside

T = TypeVar("T")


def save_checkpoint(
    folder: Path, model: PolicyModel | RewardModel, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write this rank's shards under `folder/step-N`; rank 0 marks the checkpoint complete when all are written.

    Only trained weights are saved: a run that resumes has loaded the others already.

    Args:
        state: JSON values that `load_checkpoint` returns; must hold "step".
    """
    path = _begin(folder, state)
    with _in_words(path):
        dcp.save(_state(model, optimizer), checkpoint_id=path)
    _complete(path, state)
    return path


class CheckpointWriter:
    """Saves checkpoints one at a time, beside training if asked: it then goes on once its state has been copied.

    Every rank must make it, and call `save` and `wait` after the same steps.

    Args:
        background: copy the state to CPU memory (12 bytes a trained weight), and write and mark it in a thread, whose
            ranks talk over a gloo group of their own.
    """

    def __init__(self, *, background: bool):
        self.background = background
        self.group = dist.new_group(backend="gloo") if background and dist.is_initialized() else None
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[Path] | None = None

    def save(
        self, folder: Path, model: PolicyModel | RewardModel, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> None:
        """Begin to save a checkpoint, as `save_checkpoint`, once the one before is complete.

        Raises:
            Exception: what went wrong when the one before was written.
        """
        self.wait()
        if not self.background:
            self._running = Future()
            self._running.set_result(save_checkpoint(folder, model, optimizer, state))
            return
        path = _begin(folder, state)
        written = dcp.async_save(
            _state(model, optimizer),
            checkpoint_id=path,  # one writing thread a rank: torch loses the errors of several
            async_stager=DefaultStager(StagingOptions(False, False, False, False)),
            process_group=self.group,
        )
        assert isinstance(written, Future)  # the stager copies before it returns
        self._running = self._threads.submit(_completed, written, path, state, self.group)

    def check(self) -> None:
        """Raise what went wrong in the background, if anything has by now. A single rank may call it."""
        if self._running is not None and self.done:
            self._running.result()

    @property
    def done(self) -> bool:
        """Whether nothing is being written."""
        return self._running is None or self._running.done()

    def wait(self) -> Path | None:
        """Wait until the checkpoint that was begun is complete.

        Returns:
            That checkpoint; None if none was begun since the last call.

        Raises:
            Exception: what went wrong when it was written, on every rank.
        """
        running, self._running = self._running, None
        return None if running is None else running.result()


def _begin(folder: Path, state: dict[str, Any]) -> Path:
    """Make the folder of a checkpoint, without what an earlier attempt left there."""
    path = folder / f"step-{state['step']:06d}"
    if rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True, exist_ok=True)
    barrier()
    return path


def _completed(written: Future[Any], path: Path, state: dict[str, Any], group: dist.ProcessGroup | None = None) -> Path:
    with _in_words(path):
        written.result()
    _complete(path, state, group)
    return path


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    """Raise a failed write as an `Exception`, which torch's own is not, and a full disk as that.

    Raises:
        OSError: the disk is full. RuntimeError: any other failure.
    """
    try:
        yield
    except CheckpointException as error:
        said = [str(failure) for failure, _ in error.failures.values()]
        # the second is how torch's writer of archives tells of a file that did not take all that it was given
        if any(re.search(r"No space left on device|unexpected pos \d+ vs \d+", text) for text in said):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise RuntimeError(f"{path} was not written: {said[0]}") from error


def _complete(path: Path, state: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Mark a checkpoint that all ranks have written as complete. One rank's error is raised on all: none waits."""
    files: dict[str, Any] = {}
    for part in of_all_ranks(_tried(lambda: _record(path)), group):
        if isinstance(part, OSError):
            raise part
        files |= part
    marked = None
    if rank() == 0:  # the file that rank 0 writes last names those of all ranks
        marked = _tried(lambda: write_atomically(path / MARK, json.dumps(state | {FILES: files}, indent=1)))
    if isinstance(marked := from_rank_0(marked, group), OSError):
        raise marked


def _tried(work: Callable[[], T]) -> T | OSError:
    """The result, or the error of a disk as a value, which can be sent to the other ranks."""
    try:
        return work()
    except OSError as error:
        return error


def _record(path: Path) -> dict[str, list[Any]]:
    """Size and hash of the files that this rank wrote, while the machine still has them in memory."""
    own = sorted(path.glob(f"__{rank()}_*"))
    if rank() == 0:
        own.append(path / METADATA)
    return {file.name: [file.stat().st_size, _sha256(file)] for file in own}


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def newest_whole_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are those that were written. Every rank must call it, and gets the same.

    A checkpoint whose files are not is renamed to `torn-step-N`, and the one before it is looked at. The ranks share
    the reading: each hashes a part of the files.

    Returns:
        The checkpoint, or None; and a sentence about each that was set aside.
    """
    remarks: list[str] = []
    for path in reversed(from_rank_0(complete_checkpoints(folder) if rank() == 0 else None)):
        faults = check_whole(path)
        if not faults:
            return path, remarks
        if rank() == 0:
            aside = path.with_name(TORN + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        barrier()
        remarks.append(f"checkpoint {path.name} is not whole ({faults[0]}) and was set aside as {TORN}{path.name}")
    return None, remarks


def check_whole(path: Path) -> list[str]:
    """What is wrong with a checkpoint's files; nothing, as a rule. Every rank must call it, and gets the same."""
    record = from_rank_0(read_state(path).get(FILES, {}) if rank() == 0 else None)
    return [fault for part in of_all_ranks(_faults(path, record)) for fault in part]


def _faults(path: Path, record: dict[str, tuple[int, str]]) -> list[str]:
    """What is wrong with this rank's part of a checkpoint's files. One of an earlier version has no record of them."""
    faults = []
    for name in sorted(record)[rank() :: world_size()]:
        file, (size, digest) = path / name, record[name]
        try:
            found = file.stat().st_size
            if found != size:
                faults.append(f"{name} has {found:,} bytes instead of {size:,}")
            elif _sha256(file) != digest:
                faults.append(f"the content of {name} has changed")
        except OSError as error:
            faults.append(f"{name}: {error.strerror}")
    return faults


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if _is_complete(path)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _is_complete(path: Path) -> bool:
    try:
        return "step" in read_state(path)
    except (OSError, ValueError):
        return False


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a complete checkpoint, and the record of its files."""
    return json.loads((path / MARK).read_text())


def load_checkpoint(path: Path, model: PolicyModel | RewardModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load shards into the model and the optimizer, whatever the number of ranks that wrote them.

    Returns:
        The state that `save_checkpoint` was given.

    Raises:
        WorkError: blocks of 8-bit optimizer states would have to be cut between this number of ranks.
    """
    tree = _state(model, optimizer)
    try:
        dcp.load(tree, checkpoint_id=path)  # into the weights themselves
    except CheckpointException as error:
        if not any("align with block boundary" in str(failure) for failure, _ in error.failures.values()):
            raise
        raise WorkError(
            f"{path} has optimizer states in blocks of 256 values, which cannot be divided over {world_size()} workers."
            f" Go on with the train.workers that wrote it ({read_state(path).get('world', 'see its run')})."
        ) from error
    set_optimizer_state_dict(model, optimizer, tree["optimizer"])
    state = from_rank_0(read_state(path) if rank() == 0 else None)
    return {name: value for name, value in state.items() if name != FILES}


def _state(model: PolicyModel | RewardModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    # not the modules' state dict: 4-bit weights add entries to it that cannot be sharded
    weights = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"model": weights, "optimizer": get_optimizer_state_dict(model, optimizer)}


def prune_checkpoints(folder: Path, keep: int, best: int | None) -> None:
    """Delete all complete checkpoints but the newest `keep` and that of step `best`. Rank 0 only."""
    for path in complete_checkpoints(folder)[:-keep]:
        if best is None or path.name != f"step-{best:06d}":
            (path / MARK).unlink()  # the mark first: an interrupted deletion must not leave a complete checkpoint
            shutil.rmtree(path)
