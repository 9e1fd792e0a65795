"""Progress of long work on the terminal: a bar for each piece with its ETA; plain lines where there is no terminal."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY = 10.0  # seconds between two lines of the same work when nobody watches a terminal


class Bars:
    """Shows `(what, done, total, text)` calls; a context manager."""

    def __init__(self, console: Console):
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, Any] = {}
        self.said: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def show(self, what: str, done: int, total: int, text: str = "") -> None:
        """Move the bar of `what`; the first call makes it. A total of 0 prints the remark alone."""
        if not total:
            self.console.print(f"{what}: {text}", markup=False, highlight=False, soft_wrap=True)
            return
        if not self.console.is_terminal:
            self._line(what, done, total, text)
            return
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=total, text=text)
        self.progress.update(self.tasks[what], completed=done, total=total, text=text)

    def _line(self, what: str, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        last, said = self.said.get(what, (float("-inf"), -1))
        if done == said or (done < total and now - last < LINE_EVERY):
            return
        self.said[what] = (now, done)
        self.console.print(
            f"{what}: {done:,}/{total:,}  {text}".rstrip(), markup=False, highlight=False, soft_wrap=True
        )
