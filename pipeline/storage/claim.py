"""One writer for a run on object storage.

The claim is an object that says who holds it, with a count that its holder raises every few seconds. Object storage
as pyarrow offers it cannot create an object only where there is none, so a claim is read again after a while: of two
that are made within that while, the one written last holds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from otpo.errors import UserError, WorkError
from pipeline.lock.holder import Holder
from pipeline.lock.lock import LEASE_SECONDS, POLL_SECONDS
from pipeline.progress import Progress, silent
from pipeline.storage.remote import Remote

CLAIM = ".writer.json"
SETTLE_SECONDS = 2.0


class Claim:
    """A claim of this process on a run."""

    def __init__(self, remote: Remote):
        self.remote, self.holder, self.count = remote, Holder.here(), 0

    def write(self) -> None:
        """Make the claim, or show that its holder lives."""
        self.count += 1
        self.remote.write(CLAIM, json.dumps({"count": self.count, "holder": asdict(self.holder)}).encode())

    def beat(self) -> None:
        """Show that its holder lives.

        Raises:
            WorkError: it is another's now.
        """
        if not self.held():
            raise WorkError(
                f"{self.remote.address}: this process no longer holds it, because another took it over or its claim"
                f" {CLAIM} was deleted. What was copied there is kept; run the same command once the other has ended."
            )
        self.write()

    def held(self) -> bool:
        """Whether the claim that is there is this one."""
        found = _read(self.remote)
        return found is not None and found[1] is not None and found[1].token == self.holder.token


def _read(remote: Remote) -> tuple[int, Holder | None] | None:
    content = remote.read(CLAIM)
    if content is None:
        return None
    try:
        found = json.loads(content)
        return int(found["count"]), Holder.parse(json.dumps(found["holder"]))
    except (ValueError, TypeError, KeyError):
        return 0, None


@contextmanager
def claimed(remote: Remote, *, progress: Progress = silent) -> Iterator[Claim]:
    """Hold a run on object storage for the block.

    Raises:
        UserError: another process holds it, or the storage cannot be read or written.
    """
    claim = Claim(remote)
    try:
        _await_its_end(remote, progress)
        claim.write()
        time.sleep(SETTLE_SECONDS)
        if not claim.held():
            raise UserError(f"{remote.address}: another process began to write it at the same moment. Run it later.")
    except WorkError as error:
        raise UserError(
            f"--runs: the storage cannot be read and written. {error}\nCheck the bucket's name, the keys"
            " (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the machine's role), AWS_REGION and, for a server that"
            " is not Amazon's, AWS_ENDPOINT_URL."
        ) from error
    try:
        yield claim
    finally:
        if claim.held():
            remote.delete(CLAIM)


def _await_its_end(remote: Remote, progress: Progress) -> None:
    """Return once nobody holds the run: at once, or when its holder showed no sign of life for as long as a lease.

    Raises:
        UserError: its holder lives.
    """
    found, since, said = _read(remote), time.monotonic(), False
    first = found
    while found is not None:
        holder = found[1]
        who = holder.described if holder else f"the writer behind {CLAIM}"
        lives = holder.lives() if holder else None
        if lives or found != first:
            raise UserError(
                f"{remote.address} is being written by {who}.\nTwo writers would mix their files. Wait until it has"
                " ended, stop it, or give this run a name of its own (name=...) or another folder (--runs)."
            )
        if lives is False or time.monotonic() - since > LEASE_SECONDS:
            return
        if not said:
            progress(remote.address, 0, 0, f"waiting up to {LEASE_SECONDS:g} s for a sign of life of {who}")
        said = True
        time.sleep(POLL_SECONDS * 4)
        found = _read(remote)
