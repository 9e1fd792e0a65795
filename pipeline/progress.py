"""The one type of progress callback in `pipeline`. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int, str], None]
"""Called as work proceeds: (what, done, total, remark), for example ("train dpo", 5, 40, "loss 0.6931").

Every call about one piece of work has the same `what`; `done == total` is its last call. Callers may drop calls.
A call with total 0 counts nothing: it is a remark that a person should read.
"""


def silent(what: str, done: int, total: int, remark: str) -> None:
    """A `Progress` that shows nothing."""
