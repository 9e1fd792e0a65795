"""Keeps what native code writes to standard error off the terminal: state dumps, stacks and notes of Ray's C++ parts.

Native code writes to descriptor 2. A command moves Python's own standard error to another descriptor first, and once
Ray's folder of logs is known, descriptor 2 becomes a file there.
"""

from __future__ import annotations

import os
import sys

_terminal: int | None = None


def part_stderr() -> None:
    """Give `sys.stderr` a descriptor of its own. For a command that owns its process, before anything holds the old.

    Nothing where `sys.stderr` is somebody else's already, as in a notebook or under pytest.
    """
    global _terminal
    old = sys.stderr
    if old is not sys.__stderr__ or old is None:
        return
    _terminal = os.dup(2)
    sys.stderr = open(_terminal, "w", encoding=old.encoding, errors=old.errors, buffering=1, closefd=False)


def terminal() -> int | None:
    """The descriptor of standard error that is left for people; None where `part_stderr` was not called."""
    return _terminal


def native_words_to(path: str) -> None:
    """Send what native code writes from now on to the end of a file; nothing where `part_stderr` was not called."""
    if _terminal is None:
        return
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, 2)
    os.close(file)
