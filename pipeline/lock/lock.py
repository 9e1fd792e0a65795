"""One writer for a folder or a file, on any file system that creates files exclusively, NFS included.

    with one_writer(Path("runs/mine")):
        ...

A claim is a file `writer-N.lock` that says who holds it. Creating a file exclusively is the one operation that this
rests on: kernel locks are missing or unreliable on network storage, and are lost with the process that a person would
like to hear about. The holder sets the file's time every few seconds, its sign of life.

A claim is stale when its process is gone (on the same machine) or has shown no sign of life for `LEASE_SECONDS` of the
watcher's own clock (on any other), so that clocks of two machines are never compared. Whoever finds claim N stale
creates claim N + 1, which only one can; a holder that finds its claim gone stops.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from otpo.errors import UserError, WorkError
from pipeline.lock.holder import Holder
from pipeline.progress import Progress, silent

BEAT_SECONDS = 5.0  # between two signs of life
LEASE_SECONDS = 90.0  # NFS shows other machines a file's time up to 60 s late
POLL_SECONDS = 0.5


class Held(UserError):
    """Another process writes there."""


@contextmanager
def one_writer(folder: Path, file: str = "", *, otherwise: str, progress: Progress = silent) -> Iterator[None]:
    """Hold a folder for the block, or one file in it.

    A missing folder is made, and removed if the block leaves it empty.

    Args:
        file: its name; empty for all of the folder.
        otherwise: how to give this call a place of its own: the end of the sentence "..., or ...".
        progress: told why the start waits, where another machine's holder has to be watched.

    Raises:
        Held: another process holds it. UserError: the folder cannot be written.
        WorkError: the claim was taken away while the block ran.
    """
    path = folder / file
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claim = _acquire(_Claims(folder, f"{file}." if file else ""), path, otherwise, progress)
    except OSError as error:
        raise UserError(
            f"The folder {folder} cannot be written: {error.strerror}. Make it writable, or {otherwise}."
        ) from error
    heart = _Heart(claim)
    heart.start()
    try:
        yield
    except KeyboardInterrupt:
        if heart.lost:
            raise _taken(path) from None
        raise
    finally:
        heart.stop.set()
        if not heart.lost:
            claim.path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty: something was written
                for place in made:
                    place.rmdir()
    if heart.lost:
        raise _taken(path)


def _taken(path: Path) -> WorkError:
    return WorkError(
        f"{path}: this process no longer holds it, because its lock was removed or another process took it over after"
        f" {LEASE_SECONDS:g} s without a sign of life. What was finished is kept; run the same command once the other"
        " has ended."
    )


@dataclass(frozen=True)
class _Claim:
    """A claim's file, and what was last seen of it. `holder` is None where the file cannot be read."""

    path: Path
    number: int
    holder: Holder | None
    beat: int

    @property
    def key(self) -> tuple[int, str]:
        return self.number, self.holder.token if self.holder else ""


@dataclass(frozen=True)
class _Claims:
    """The claims on one place."""

    folder: Path
    prefix: str

    def file(self, number: int) -> Path:
        return self.folder / f"{self.prefix}writer-{number}.lock"

    def read(self) -> list[_Claim]:
        names = re.compile(rf"{re.escape(self.prefix)}writer-(\d+)\.lock")
        found = [(path, match) for path in self.folder.iterdir() if (match := names.fullmatch(path.name))]
        return [claim for path, match in found if (claim := read_claim(path, int(match[1])))]

    def create(self, number: int) -> _Claim | None:
        """Make a claim; None if that number is taken."""
        holder, path = Holder.here(), self.file(number)
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return None
        try:
            with os.fdopen(file, "w") as opened:
                opened.write(holder.text)
        except OSError:  # a full disk: half a claim would be waited for
            path.unlink(missing_ok=True)
            raise
        return read_claim(path, number)


def read_claim(path: Path, number: int) -> _Claim | None:
    """A claim as it is now; None if it is gone."""
    try:
        with path.open() as file:  # opening makes NFS ask the server for the file's present time
            return _Claim(path, number, Holder.parse(file.read()), os.fstat(file.fileno()).st_mtime_ns)
    except FileNotFoundError:
        return None


def _acquire(claims: _Claims, path: Path, otherwise: str, progress: Progress) -> _Claim:
    watched: dict[tuple[int, str], tuple[int, float]] = {}
    said = False
    while True:
        found = claims.read()
        lives = [_lives(claim, watched) for claim in found]
        if True in lives:
            raise Held(_refusal(path, found[lives.index(True)], otherwise))
        if None in lives:
            if not said:
                who = _who(found[lives.index(None)])
                progress(str(path), 0, 0, f"waiting up to {LEASE_SECONDS:g} s for a sign of life of {who}")
            said = True
            time.sleep(POLL_SECONDS)
            continue
        mine = claims.create(1 + max((claim.number for claim in found), default=0))
        if mine is None:
            continue
        # what was found stale must still be all there is: another may have taken over between the look and the claim
        if {claim.key for claim in claims.read()} - {mine.key} != {claim.key for claim in found}:
            mine.path.unlink(missing_ok=True)
            continue
        for claim in found:
            claim.path.unlink(missing_ok=True)
        return mine


def _lives(claim: _Claim, watched: dict[tuple[int, str], tuple[int, float]]) -> bool | None:
    """Whether a claim's holder lives; None as long as it has to be watched."""
    if claim.holder is not None and (lives := claim.holder.lives()) is not None:
        return lives
    beat, since = watched.setdefault(claim.key, (claim.beat, time.monotonic()))
    if claim.beat != beat:
        return True
    return None if time.monotonic() - since < LEASE_SECONDS else False


def _who(claim: _Claim) -> str:
    holder = claim.holder
    if holder is None:
        return f"the writer behind {claim.path.name}"
    return holder.described


def _refusal(path: Path, claim: _Claim, otherwise: str) -> str:
    holder = claim.holder
    stop = f"kill {holder.pid} on {holder.host}" if holder else "end its process"
    seconds = max(0.0, (_now(claim.path.parent) - claim.beat) / 1e9)
    return (
        f"{path} is being written by {_who(claim)}; last sign of life {seconds:.0f} s ago.\n"
        f"Two writers would mix their files. Wait until it has ended, stop it ({stop}), or {otherwise}."
    )


def _now(folder: Path) -> int:
    """The time by the clock that stamps files in the folder, in ns: on network storage it is the server's."""
    with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime_ns
    return time.time_ns()


class _Heart(threading.Thread):
    """Shows the claim's sign of life, and interrupts the main thread when the claim is gone."""

    def __init__(self, claim: _Claim):
        super().__init__(name="writer-lock", daemon=True)
        self.claim, self.stop, self.lost = claim, threading.Event(), False
        self.interrupts = threading.current_thread() is threading.main_thread()

    def run(self) -> None:
        missed = 0
        while not self.stop.wait(BEAT_SECONDS):
            missed = 0 if self._beat() else missed + 1
            if missed == 2 and not self.stop.is_set():  # network storage may miss a file once
                self.lost = True
                if self.interrupts:
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return

    def _beat(self) -> bool:
        """Whether the claim is still there."""
        try:
            found = read_claim(self.claim.path, self.claim.number)
            if found is None or found.key != self.claim.key:
                return False
            os.utime(self.claim.path)
        except OSError:  # storage that does not answer now; a claim that is gone is told apart above
            pass
        return True
