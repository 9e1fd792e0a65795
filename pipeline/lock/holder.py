"""Who holds a lock: enough to tell a person where to look, and to tell whether that process still lives."""

from __future__ import annotations

import getpass
import json
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

LONGEST_COMMAND = 200


@dataclass(frozen=True)
class Holder:
    """One claim on a lock.

    Attributes:
        token: names the claim.
        machine: host, boot and PID namespace: `pid` means something only where all three are the same. Two containers
            may share a host's name, and both have a process 1.
        pid: of the process that writes.
        started: when that process started, as its machine tells it; with `pid` it names one process for ever.
        since: when the claim was made, ISO 8601 in UTC.
    """

    token: str
    user: str
    host: str
    machine: str
    pid: int
    started: str
    command: str
    since: str

    @classmethod
    def here(cls) -> Holder:
        """A new claim of this process."""
        pid = os.getpid()
        return cls(
            token=secrets.token_hex(8),
            user=_user(),
            host=socket.gethostname(),
            machine=machine(),
            pid=pid,
            started=start_of(pid) or "",
            command=_command(),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    @classmethod
    def parse(cls, text: str) -> Holder | None:
        """What `text` wrote down; None for anything else, such as a file whose writer has not finished it."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None

    @property
    def text(self) -> str:
        """The claim as JSON."""
        return json.dumps(asdict(self), indent=1)

    @property
    def described(self) -> str:
        """Who it is, in words for a person."""
        return f"`{self.command}` (user {self.user}, host {self.host}, pid {self.pid}, since {self.since})"

    def lives(self) -> bool | None:
        """Whether the process lives; None where this process cannot tell, because it is another machine's."""
        if self.machine != machine():
            return None
        started = start_of(self.pid)
        return started is not None and started == self.started


def machine() -> str:
    """This host, since it was started, as processes with these PIDs see it."""
    return "|".join([socket.gethostname(), _read("/proc/sys/kernel/random/boot_id"), _namespace()])


def start_of(pid: int) -> str | None:
    """When a process of this machine started, in the machine's own terms; None if there is none."""
    stat = _read(f"/proc/{pid}/stat")
    if stat:
        fields = stat[stat.rindex(")") + 1 :].split()  # a name in parentheses may itself hold spaces and parentheses
        return None if fields[0] in "ZX" else fields[19]  # a dead process keeps its entry until its parent has seen it
    if Path("/proc/self/stat").exists():
        return None
    found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    return found.stdout.strip() or None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container may run under a number that has no name
        return str(os.getuid())


def _command() -> str:
    """The command line; a password inside an address is left out, since the lock is a file that others read."""
    line = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    line = re.sub(r"://[^/@\s]+@", "://", line)
    return line if len(line) <= LONGEST_COMMAND else f"{line[:LONGEST_COMMAND]} ..."
