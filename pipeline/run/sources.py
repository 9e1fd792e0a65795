"""What the names in a recipe stand for in a run's folder: models, tasks, pairs, and the token ids made of them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.progress import Progress
from pipeline.recipe import WORLD_PREFIX, ModelConfig, Recipe
from pipeline.run.folder import RunFolder

if TYPE_CHECKING:
    from eval.tasks import Task
    from pipeline.train.tokens import Tokens


class Sources:
    """Resolves a recipe's names. What it reads is read once.

    Args:
        progress: told how many rows of a data file are usable.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, progress: Progress):
        self.recipe, self.folder, self.progress = recipe, folder, progress
        self._tokens: dict[bool, Tokens] = {}

    def resolve(self, source: str) -> str:
        """A source of the recipe as a path or hub name: `world:x` is a path inside the world's folder."""
        if source.startswith(WORLD_PREFIX):
            return str(self.folder.world / source.removeprefix(WORLD_PREFIX))
        return str(Path(source).absolute()) if Path(source).exists() else source

    @cached_property
    def start(self) -> ModelConfig:
        """Where every method starts: the base trained here, or the recipe's model."""
        return self.recipe.model.model_copy(update={"path": self.model("base")})

    def model(self, label: str) -> str:
        """Folder or hub name of a label's model."""
        if label == "base" and not self.recipe.base:
            return self.resolve(self.recipe.model.path)
        return str(self.folder.model(label))

    def frozen_models(self, label: str) -> dict[str, str]:
        """The frozen models that a label's weight rule reads: name -> folder or hub name. Most rules read none."""
        named = {
            name: self.model(source) if source in self.recipe.methods else self.resolve(source)
            for name, source in self.recipe.method(label).frozen_models.items()
        }
        return {"reference": self.start.path, **named} if named else {}

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The prompts that models generate for."""
        from eval.tasks import load_task

        named = self.recipe.generate.named_tasks().items()
        return {name: load_task(self.resolve(source), name, self.recipe.generate.limit) for name, source in named}

    @property
    def pairs(self) -> str:
        """The preference pairs: the recipe's, or those that are sampled here."""
        return str(self.folder.pairs) if self.recipe.pairs else self.resolve(self.recipe.data.path or "")

    @property
    def base_rows(self) -> str:
        """The rows of supervised training."""
        return self.resolve((self.recipe.base or {})["data"])

    def tokens(self, *, supervised: bool = False) -> Tokens:
        """Token ids of the pairs, or of the base's rows. Both by the tokenizer of the recipe's model.

        Raises:
            UserError: the file, the tokenizer or the rows cannot be used.
        """
        if supervised not in self._tokens:
            from pipeline.train.tokens import prepare_tokens

            source = self.base_rows if supervised else self.pairs
            model = self.resolve(self.recipe.model.path)
            tokens = prepare_tokens(self.recipe, self.folder.path, model=model, source=source, supervised=supervised)
            self._tokens[supervised] = tokens
            report = tokens.report
            left_out = ", ".join(f"{len(rows)} {reason}" for reason, rows in report.problems.items())
            what = f"{report.counted} of {Path(source).name}"
            remark = f"usable; left out: {left_out}" if left_out else "usable"
            self.progress(what, report.n_usable, report.n_groups, remark)
        return self._tokens[supervised]
