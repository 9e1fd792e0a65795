"""A run that is kept on object storage and worked on in a local folder."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from otpo.errors import WorkError
from otpo.files import is_address
from pipeline.progress import Progress, silent
from pipeline.run.folder import RunFolder
from pipeline.storage.claim import Claim, claimed
from pipeline.storage.copying import Copying, fetch_missing, send_missing
from pipeline.storage.remote import Remote, check_address, open_remote

COPY_SECONDS = 20.0  # between two copies
TRIES = 3  # of the last copy


def working_folder(address: str) -> Path:
    """The local folder in which the runs of an address are worked on."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:12]
    return cache.absolute() / "otpo" / "runs" / digest


@contextmanager
def run_folder(runs: str | Path, name: str, *, progress: Progress = silent) -> Iterator[Path]:
    """The local folder of a run, for the block; where `runs` is an address, it is fetched before and copied there.

    Raises:
        UserError: an address that is not understood. And what `stored_run` raises.
    """
    if not is_address(runs):
        yield Path(runs) / name
        return
    check_address(str(runs))
    with stored_run(str(runs), name, progress=progress) as local:
        yield local / name


@contextmanager
def stored_run(address: str, name: str, *, progress: Progress = silent) -> Iterator[Path]:
    """Work on a run that is kept at `address`/`name`, for the block.

    What another machine has left there is fetched first. What the block writes is copied there every
    `COPY_SECONDS`, and when the block ends, also by an error. A copy that fails in between is tried again.

    Args:
        address: of the folder of runs, such as `s3://bucket/runs`.
        name: of the run.
        progress: told what is fetched and copied, and why a copy failed.

    Yields:
        The local folder of runs. The scorers' caches beside the run are kept there as well.

    Raises:
        UserError: the storage cannot be read or written, or another process writes this run; nothing was started.
        WorkError: the last copy failed; everything is in the local folder.
    """
    remote, runs = open_remote(address), working_folder(address)
    with claimed(remote.folder(name), progress=progress) as claim:
        copying = Copying(remote.folder(name), runs / name, runs / f"{name}.copied.json")
        fetched = copying.fetch(progress)
        came = f", where {fetched} files were fetched" if fetched else ""
        progress(f"{remote.address}/{name}", 0, 0, f"worked on in {runs / name}{came}")
        copies = _Copies(remote, copying, claim, progress)
        copies.fetch_scorers()
        copies.start()
        try:
            yield runs
        except BaseException:
            try:
                copies.end()
            except WorkError as error:  # what ended the block is the error that a person needs
                progress("copy", 0, 0, str(error))
            if copies.lost:
                raise copies.lost from None
            raise
        copies.end()
        if copies.lost:
            raise copies.lost


class _Copies(threading.Thread):
    """Copies a run while it is worked on, and interrupts the main thread when the run is another's."""

    def __init__(self, remote: Remote, copying: Copying, claim: Claim, progress: Progress):
        super().__init__(name="copies", daemon=True)
        self.copying, self.claim, self.progress = copying, claim, progress
        scorers = RunFolder(copying.local).frozen_caches
        self.scorers, self.at = scorers, remote.folder(scorers.name)
        self.sent: set[str] = set()
        self.lost: WorkError | None = None
        self.ended = threading.Event()
        self.interrupts = threading.current_thread() is threading.main_thread()

    def fetch_scorers(self) -> None:
        """Fetch what other runs computed with frozen models."""
        fetch_missing(self.at, self.scorers, self.progress)
        self.sent = set(self.at.objects())

    def run(self) -> None:
        said = ""
        while not self.ended.wait(COPY_SECONDS):
            try:
                self.claim.beat()
            except WorkError as error:
                if self.claim_is_lost(error):
                    return
            try:
                self.copy(silent)
            except (WorkError, OSError) as error:
                if str(error) != said:
                    self.progress("copy", 0, 0, f"{error}; it is tried again every {COPY_SECONDS:g} s")
                said = str(error)

    def claim_is_lost(self, error: WorkError) -> bool:
        """Stop where the claim is another's; go on where the storage does not answer now."""
        try:
            if self.claim.held():
                return False
        except WorkError:
            return False
        self.lost = error
        if self.interrupts and not self.ended.is_set():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return True

    def copy(self, progress: Progress) -> int:
        """Copy what has changed since the last time."""
        send_missing(self.at, self.scorers, self.sent, progress)
        return self.copying.send(progress)

    def end(self) -> None:
        """Copy once more.

        Raises:
            WorkError: it failed, each time that it was tried.
        """
        self.ended.set()
        self.join()
        for left in range(TRIES, 0, -1) if not self.lost else ():
            try:
                # a file may change once more while it is copied
                while self.copy(self.progress):
                    pass
                return
            except (WorkError, OSError) as error:
                if left == 1:
                    raise WorkError(
                        f"The run could not be copied to its storage. {error}\nAll of it is in {self.copying.local};"
                        " the same command copies it."
                    ) from error
