"""The one type of progress callback in `pipeline`. Imports nothing heavy."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""Called as work proceeds: (what, done, total, remark), for example ("train dpo", 5, 40, "loss 0.6931").

Every call about one piece of work has the same `what`; `done == total` is its last call. Callers may drop calls.
A call with total 0 counts nothing: it is a remark that a person should read.
"""


def silent(what: str, done: int, total: int, remark: str) -> None:
    """A `Progress` that shows nothing."""


LINE_SECONDS = 10.0  # between two lines about the same piece of work


class Lines:
    """A `Progress` that writes plain lines: one about each piece of work every ten seconds, and every remark.

    Args:
        write: called with each line; by default it is printed to stderr.
    """

    def __init__(self, write: Callable[[str], object] = lambda line: print(line, file=sys.stderr)):
        self.write = write
        self.written: dict[str, tuple[float, int]] = {}

    def __call__(self, what: str, done: int, total: int, remark: str) -> None:
        """Write the line if it is due."""
        if not total:
            self.write(f"{what}: {remark}")
            return
        now = time.monotonic()
        last, before = self.written.get(what, (float("-inf"), -1))
        if done != before and (done >= total or now - last >= LINE_SECONDS):
            self.written[what] = (now, done)
            self.write(f"{what}: {done:,}/{total:,}  {remark}".rstrip())
