"""What the names in a recipe stand for in a run's folder: models, tasks, pairs, and the token ids made of them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from otpo.data.template import AS_TRAINED, Choice, Rendering, of_run, one_line, trained_with
from pipeline.progress import Progress
from pipeline.recipe import WORLD_PREFIX, ModelConfig, Recipe
from pipeline.run.folder import RunFolder
from pipeline.train.models import check_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from eval.tasks import Task
    from otpo.data.report import DataReport
    from pipeline.train.tokens import Tokens

SHOWN = 400  # characters of a rendered prompt


class Sources:
    """Resolves a recipe's names. What it reads is read once.

    Args:
        progress: told how many rows of a data file are usable.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, progress: Progress):
        self.recipe, self.folder, self.progress = recipe, folder, progress
        self._tokens: dict[bool, Tokens] = {}
        self._said_template = False

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
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the recipe's model.

        Raises:
            UserError: the model has none that can be used.
        """
        from otpo.data.tokens import load_tokenizer

        return load_tokenizer(self.resolve(self.recipe.model.path))

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The prompts that models generate for."""
        from eval.tasks import load_task

        named = self.recipe.generate.named_tasks().items()
        return {name: load_task(self.resolve(source), name, self.recipe.generate.limit) for name, source in named}

    @property
    def pairs(self) -> str | dict[str, str]:
        """The preference pairs: the recipe's (of a mix, the source of each data set), or those sampled here."""
        if self.recipe.pairs:
            return str(self.folder.pairs)
        if self.recipe.data.datasets:
            return {name: self.resolve(each.path) for name, each in self.recipe.data.datasets.items()}
        return self.resolve(self.recipe.data.path or "")

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
            tokens = prepare_tokens(
                self.recipe, self.folder.path,
                model=model, source=source, supervised=supervised, progress=self.progress,
            )  # fmt: skip
            labels = ["base"] if supervised else list(self.recipe.methods)
            name = Path(source).name if isinstance(source, str) else ", ".join(source)
            check_tokens(tokens, self.recipe, model, name, labels)
            self._tokens[supervised] = tokens
            self.say_template()
            for report, remark in [(each.report, str(each)) for each in tokens.sets] or [(tokens.report, "")]:
                self._say_usable(report, remark)
        return self._tokens[supervised]

    def _say_usable(self, report: DataReport, remark: str) -> None:
        name = Path(report.source).name
        left_out = ", ".join(f"{len(rows)} {reason}" for reason, rows in report.problems.items())
        usable = f"usable; left out: {left_out}" if left_out else "usable"
        usable += f"; columns that are not read: {', '.join(report.ignored)}" if report.ignored else ""
        self.progress(f"{report.counted} of {name}", report.n_usable, report.n_groups, f"{usable}{remark}")
        first = one_line(report.example["prompt"]["text"], SHOWN)
        self.progress(f"first training prompt of {name}", 0, 0, first)

    def say_template(self) -> None:
        """Tell the run's template, once, before anything else about its rows.

        Raises:
            UserError: as `template`.
        """
        if not self._said_template:
            choice = self.template  # reads the rows, which may tell it
            if not self._said_template:
                self._said_template = True
                self.progress("template", 0, 0, str(choice))

    @property
    def template(self) -> Choice:
        """The one template of the run: of training, sampled pairs, generation, reward models and token weights.

        Raises:
            UserError: parts of the run would see prompts rendered differently.
        """
        recipe, rows = self.recipe, {}
        if recipe.base:
            rows["base.data"] = self._rows_template(["base"], supervised=True)
        if recipe.methods and recipe.data.given:
            key = "data.path" if recipe.data.path else "data.datasets"
            rows[key] = self._rows_template(list(recipe.methods), supervised=False)
        return of_run(
            recipe.data.template, recipe.generate.template, rows, self.resolve(recipe.model.path),
            recipe.data.chat_template_kwargs,
        )  # fmt: skip

    @property
    def generation_template(self) -> Rendering:
        """The template of the run as generation uses it.

        Raises:
            UserError: as `template`; also training rows that were rendered in two ways.
        """
        return self.template.for_generation

    def _rows_template(self, labels: list[str], *, supervised: bool) -> Choice:
        """The template of training rows; where the labels are trained already, their models' folders say it."""
        if self.recipe.data.template != "auto":
            return Choice(self.recipe.data.template, "as data.template says")
        if supervised not in self._tokens:
            for label in labels:
                if trained := trained_with(self.folder.model(label)):
                    return Choice(trained, AS_TRAINED)
        return self.tokens(supervised=supervised).report.choice
