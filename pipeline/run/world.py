"""What a recipe's `world:` values stand for."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from pipeline.run.folder import RunFolder


class World(Protocol):
    """A prepared world with known truth, such as `jobs/small_world`."""

    def prepare(self, folder: Path, settings: dict[str, Any]) -> None:
        """Write the world's files into `folder`; does nothing where they are there already."""

    def serve(self, folder: Path) -> AbstractContextManager[str]:
        """Run the world's judge; gives its URL."""

    def measure(self, folder: RunFolder, labels: list[str], methods: dict[str, Any]) -> None:
        """Write `world.json` into the run's folder: what only a known truth allows to measure."""
