"""The terminal that every verb writes to, and checks of what a person typed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from otpo.errors import UserError

console = Console(width=None if sys.stdout.isatty() else 160)  # piped tables keep their rows whole
stderr = Console(stderr=True)


def show(text: str) -> None:
    """Print a line of the result, as it is and unwrapped."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a remark on standard error, as it is and unwrapped."""
    stderr.print(text, markup=False, highlight=False, soft_wrap=True)


def one_of(option: str, value: str, *known: str) -> Any:
    """The value, if it is known."""
    if value not in known:
        raise UserError(f"{option} {value}: expected one of {', '.join(known)}.")
    return value


def writable(folder: Path) -> None:
    """Make a folder, and refuse one that cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"The folder {folder} cannot be written: {error.strerror}. Choose another with --out."
        ) from error
