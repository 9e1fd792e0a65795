"""Progress of long work on the terminal: a bar for each piece with its ETA; plain lines where there is no terminal."""

from __future__ import annotations

from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.progress import Lines


class Bars:
    """Shows `(what, done, total, text)` calls; a context manager."""

    def __init__(self, console: Console):
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, Any] = {}
        self.lines = Lines(partial(console.print, markup=False, highlight=False, soft_wrap=True))

    def __enter__(self) -> Bars:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def show(self, what: str, done: int, total: int, text: str = "") -> None:
        """Move the bar of `what`; the first call makes it. A total of 0 prints the remark alone."""
        if not (total and self.console.is_terminal):
            self.lines(what, done, total, text)
            return
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=total, text=text)
        self.progress.update(self.tasks[what], completed=done, total=total, text=text)
