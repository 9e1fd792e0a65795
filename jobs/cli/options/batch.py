"""Judging in files, or its price alone, as a group of options."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from otpo.errors import UserError

if TYPE_CHECKING:
    from jobs.batching import Offline
    from jobs.cli.options.judge import JudgeOptions


@dataclass(frozen=True)
class BatchOptions:
    """What a person says of judging without calls."""

    batch_write: Annotated[
        Path | None,
        typer.Option("--batch-write", help="write the questions to a batch file in OpenAI's format, and ask nothing"),
    ] = None
    batch_read: Annotated[
        list[Path] | None,
        typer.Option("--batch-read", show_default=False, help="take replies from a batch's files, and ask nothing"),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say how many calls there would be and their price, and ask nothing")
    ] = False

    def offline(self, asked: JudgeOptions) -> Offline:
        """Which of them is wanted; all empty where the judge is called.

        Raises:
            UserError: two of them, or one beside a judge that is loaded here.
        """
        from jobs.batching import Offline

        given = [f"--{field.name.replace('_', '-')}" for field in fields(self) if getattr(self, field.name)]
        if len(given) > 1 or (given and asked.loaded):
            raise UserError(f"{' and '.join(given + asked.loaded)}: keep one.")
        return Offline(self.batch_write, tuple(self.batch_read or ()), self.dry_run)
