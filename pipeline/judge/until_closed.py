"""Runs a command until standard input ends, then ends it and everything that it started.

    python until_closed.py COMMAND ...

Whoever starts this holds the other end of its input. That end closes with its process, however the process ends: a
server that was started so outlives nobody. This file imports nothing of the project.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

PATIENCE = 15.0  # seconds between the request to end and the signal that nothing survives


def main(command: list[str]) -> int:
    """The exit code of the command, or 0 where the input ended first."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        while child.poll() is None:
            readable, _, _ = select.select([sys.stdin], [], [], 0.5)
            if readable and not os.read(sys.stdin.fileno(), 4096):
                return 0
        return child.returncode
    finally:
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the command's whole group of processes: a server's workers may live longer than the server."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, sign)
        until = time.monotonic() + PATIENCE
        while child.poll() is None and time.monotonic() < until:
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
