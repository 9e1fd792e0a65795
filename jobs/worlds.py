"""The worlds that a recipe's `world` section can name, as `pipeline.run.world.World`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from otpo.errors import UserError
from pipeline.recipe import Recipe
from pipeline.run.folder import RunFolder
from pipeline.run.world import World


class SmallWorld:
    """`jobs/small_world` as the stages of a run see it."""

    def prepare(self, folder: Path, settings: dict[str, Any]) -> None:
        """Write facts, prompts, tokenizer and random model."""
        from jobs.small_world.prepare import prepare

        try:
            prepare(folder, **settings)
        except TypeError as error:
            raise UserError(
                f"world: {error}. Known keys: seed, entities, posts, base_answers, right, rambling, length_liking."
            ) from error

    def serve(self, folder: Path) -> AbstractContextManager[str]:
        """The world's judge and annotator on loopback."""
        from jobs.small_world.judge_server import serve

        return serve(folder)

    def measure(self, folder: RunFolder, labels: list[str], methods: dict[str, Any]) -> None:
        """Accuracy against the known truth, lengths, and where the weight goes."""
        from jobs.small_world.truth import measure

        measure(folder, labels, methods)


def world_of(recipe: Recipe) -> World | None:
    """The world behind a recipe, if it has one."""
    return SmallWorld() if recipe.world is not None else None
