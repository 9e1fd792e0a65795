"""A whole recipe: its sections, whether they agree with each other, and errors that name each key.

A recipe is checked before anything heavy is imported.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from eval.judge.config import JudgeConfig
from otpo.errors import UserError
from otpo.methods.spec import MethodSpec, resolve
from pipeline.recipe.data import DataConfig, DatasetConfig
from pipeline.recipe.hints.lookup import answer_for, flat, looks_foreign, translate
from pipeline.recipe.sections import (
    ClusterConfig,
    GenerateConfig,
    ModelConfig,
    PairsConfig,
    ReportConfig,
    Section,
    TrainConfig,
    long_form,
    short_dtype,
)
from pipeline.recipe.study import StudyConfig
from pipeline.recipe.sweep import SweepConfig

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_NAME_LIKE = re.compile(r"[^A-Za-z0-9._-]+")

_UNSET = {
    "max_steps": "; leave it out to train for train.epochs",
    **dict.fromkeys(("eval_every", "early_stopping_patience"), "; leave it out for none"),
    "save_every": "; leave it out to save by train.save_minutes, and set that to null for none",
}
"""What 0 and -1 mean in other trainers."""

REMOVED = {"report.bootstrap_samples": "every interval is made of 2,000 resamples"}
"""Keys of earlier versions that change nothing any more: dotted key -> what holds instead. Old recipes still load."""


class Recipe(Section):
    """Everything a run is made of."""

    name: str = Field(description="Name of the run and of its folder.")
    world: dict[str, Any] | None = Field(
        None, description="Prepares the small world: {seed: 0}. Paths `world:...` then lie in it."
    )
    model: ModelConfig = Field(description="The model before training; a path alone stands for {path: ...}.")
    base: dict[str, Any] | None = Field(
        None,
        description="Supervised training first: `data`, a file of {prompt, completion} rows, `columns` as in"
        " `data`, and keys of `train`.",
    )
    pairs: PairsConfig | None = Field(
        None, description="Samples the preference pairs from the model. Unset: data.path."
    )
    data: DataConfig = Field(
        DataConfig(),
        description="The preference pairs and how they become tokens; a path alone stands for {path: ...}.",
    )
    methods: dict[str, dict[str, Any]] = Field(
        {},
        description="Label of each trained model: its `method`, hyperparameters, keys of `train`; or a list of labels.",
    )
    train: TrainConfig = Field(TrainConfig(), description="How every method trains.")
    generate: GenerateConfig = Field(GenerateConfig(), description="The outputs that are judged.")
    judge: JudgeConfig = Field(JudgeConfig(), description="Who judges the outputs.")
    report: ReportConfig = Field(ReportConfig(), description="The page and its intervals.")
    sweep: SweepConfig = Field(SweepConfig(), description="What `otpo sweep` tries.")
    study: StudyConfig = Field(StudyConfig(), description="What `otpo study` compares after its sweep.")
    cluster: ClusterConfig = Field(ClusterConfig(), description="Where Ray is.")
    tracking: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        [], description="Trackers that get the training metrics and the leaderboard: a name, or a list of names."
    )

    @field_validator("tracking", mode="before")
    @classmethod
    def _list_of_trackers(cls, value: Any) -> Any:
        """One name stands for a list of one; `none` and nothing for an empty one."""
        if value in (None, "none"):
            return []
        return [value] if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _free_sections(cls, value: Any) -> Any:
        """`methods: {dpo: }` and `methods: [dpo]` mean a label with every default; a dtype is spelled as in `train`."""
        if not isinstance(value, dict):
            return value
        value = {key: long_form(key, section) for key, section in value.items()}
        if isinstance(value.get("methods"), dict):
            value["methods"] = {
                label: _with_short_dtype(settings or {}) for label, settings in value["methods"].items()
            }
        if "base" in value:
            value["base"] = _with_short_dtype(value["base"])
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name: '{self.name}' becomes a folder: use at most 100 letters, digits, '.', '_' and '-'")
        if self.model.quantization != "none" and self.train.use_gpu is False:
            raise ValueError(
                f"model.quantization is {self.model.quantization}, which needs a CUDA GPU for every training worker,"
                " but train.use_gpu is false: set model.quantization to none, or train.use_gpu to true"
            )
        for label in self.methods:
            self._check_label(label)
        if len({label.lower() for label in self.methods}) < len(self.methods):
            raise ValueError("methods: two labels differ in case alone, and some disks give both the same folder")
        self.training_order()
        self._check_base()
        self._check_pairs()
        return self

    def _check_label(self, label: str) -> None:
        if not _NAME.fullmatch(label) or label == "base":
            raise ValueError(
                f"methods: the label '{label}' becomes a folder: use at most 100 letters, digits, '.', '_' and '-',"
                " not 'base'"
            )
        if self.model.lora and self.trains_rewards(label):
            raise ValueError(
                f"methods.{label}: a reward model is trained whole, because its new head could not learn beside"
                " adapters: train it in a recipe without model.lora"
            )
        self._check_train_of(label, f"methods.{label}")
        shared = [key for key in ("workers", "min_workers", "use_gpu", "max_failures") if key in self.methods[label]]
        if shared:
            raise ValueError(
                f"methods.{label}.{shared[0]}: all methods share one group of workers: set train.{shared[0]}"
            )

    def _check_base(self) -> None:
        if self.base is None:
            return
        if not self.base.get("data"):
            raise ValueError("base: needs `data`, a file of {prompt, completion} rows")
        self._check_train_of("base", "base")
        if self.train_of("base").eval_every:
            raise ValueError("base.eval_every: the base trains on all its rows and is not evaluated: leave it out")

    def _check_pairs(self) -> None:
        never = [label for label in self.methods if self.train_of(label).eval_every and not self.data.validation]
        if never:
            raise ValueError(
                f"train.eval_every of '{never[0]}' has no rows to evaluate on: set data.validation above 0, such as"
                " 0.05, or leave eval_every out"
            )
        if self.methods and not self.data.given and self.pairs is None:
            raise ValueError("methods need preference pairs: set `data.path`, or `pairs` to sample them from the model")
        if self.methods and self.data.given and self.pairs is not None:
            key = "data.path" if self.data.path else "data.datasets"
            raise ValueError(f"`{key}` and `pairs` both say where the pairs come from: keep one")

    def method(self, label: str) -> MethodSpec:
        """The method behind a label, with its hyperparameters."""
        settings = {k: v for k, v in self.methods[label].items() if k not in TrainConfig.model_fields}
        try:
            return resolve(label, settings)
        except UserError as error:
            for key, value in settings.items():
                unknown = str(error).startswith(f"methods.{label}.{key}: ") and "no such hyperparameter" in str(error)
                if unknown and (answer := answer_for(key, value, settings)):
                    raise UserError(f"methods.{label}.{key}: {answer}") from error
            raise

    def trains_rewards(self, label: str) -> bool:
        """Whether a label of `methods` is a reward model, which scores outputs and generates none."""
        return label in self.methods and self.method(label).method.objective == "reward"

    def frozen_labels(self, label: str) -> dict[str, str]:
        """The frozen models of a label that this recipe trains too: name -> label."""
        return {name: model for name, model in self.method(label).frozen_models.items() if model in self.methods}

    def training_order(self) -> list[str]:
        """The labels of `methods`, each after its frozen models, otherwise as written.

        Raises:
            ValueError: labels name each other as frozen models, or a frozen model is neither a label nor like a path.
        """
        order: list[str] = []

        def visit(label: str, above: tuple[str, ...]) -> None:
            if label in above:
                circle = " -> ".join([*above[above.index(label) :], label])
                raise ValueError(
                    f"methods: frozen models are trained first, but these labels wait for each other: {circle}"
                )
            for frozen in self.frozen_labels(label).values():
                visit(frozen, (*above, label))
            if label not in order:
                order.append(label)

        for label in self.methods:
            for name, model in self.method(label).frozen_models.items():
                if self.trains_rewards(model):
                    raise ValueError(
                        f"methods.{label}.{name}: '{model}' is a reward model, which has no log-probabilities: name a"
                        " label that trains a language model"
                    )
                if model not in self.methods and "/" not in model and not Path(model).exists():
                    raise ValueError(
                        f"methods.{label}.{name}: '{model}' is no label of `methods` ({', '.join(self.methods)})"
                        " and no model folder"
                    )
            visit(label, ())
        return order

    def _check_train_of(self, label: str, where: str) -> None:
        try:
            self.train_of(label)
        except ValidationError as error:
            raise ValueError("; ".join(f"{where}: {line}" for line in _explain(error, TrainConfig))) from error

    def train_of(self, label: str) -> TrainConfig:
        """The keys of `train` under those of the label; "base" is the supervised stage."""
        if label == "base":
            settings = {k: v for k, v in (self.base or {}).items() if k not in ("data", "columns")}
        else:
            settings = {k: v for k, v in self.methods[label].items() if k in TrainConfig.model_fields}
        # evaluation and early stopping in `train` are about preference metrics, so the base does not inherit them
        inherited = self.train.model_dump()
        if label == "base":
            inherited |= {
                k: TrainConfig.model_fields[k].default
                for k in ("max_steps", "eval_every", "best_metric", "best_mode", "early_stopping_patience")
            }
        return TrainConfig(**{**inherited, **settings})

    def labels(self) -> list[str]:
        """Every model of the run that generates outputs, the base first."""
        return ["base", *(label for label in self.methods if not self.trains_rewards(label))]


def _with_short_dtype(settings: Any) -> Any:
    if isinstance(settings, dict) and "dtype" in settings:
        return {**settings, "dtype": short_dtype(settings["dtype"])}
    return settings


def make_recipe(tree: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check a tree; every problem in one `UserError`. Keys in REMOVED are dropped with a note."""
    if looks_foreign(tree, Recipe.model_fields):
        raise UserError(_as_recipe(tree, where))
    try:
        return Recipe.model_validate(_without_removed(tree, where))
    except ValidationError as error:
        lines = _explain(error, config=dict(flat(tree)))
        raise UserError("\n".join([f"{where} is not a recipe:", *(f"  {line}" for line in lines)])) from error


def _without_removed(tree: dict[str, Any], where: str) -> dict[str, Any]:
    for key, instead in REMOVED.items():
        section, name = key.split(".")
        if isinstance(tree.get(section), dict) and name in tree[section]:
            tree = {**tree, section: {k: v for k, v in tree[section].items() if k != name}}
            logging.getLogger(__name__).warning(
                "note: %s: %s is no longer a key and is ignored: %s.", where, key, instead
            )
    return tree


def _explain(
    error: ValidationError, model: type[BaseModel] = Recipe, config: Mapping[str, Any] | None = None
) -> list[str]:
    """A line for each problem. `config` is what was checked, flat: key -> value."""
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            hint = _hint(path, problem["input"], _known_keys(problem["loc"][:-1], model), config or {})
            lines.append(f"unknown key '{path}'. {hint}")
        elif problem["type"] == "missing":
            lines.append(f"'{path}' is needed and missing.")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = "" if problem["type"] == "value_error" else f", found {problem['input']!r}"
            unset = _UNSET.get(str(problem["loc"][-1]) if problem["loc"] else "", "")
            unset = unset if problem["input"] in (0, -1) else ""
            lines.append(f"{path + ': ' if path else ''}{message}{found}{unset}")
    return lines


def _known_keys(path: tuple[int | str, ...], model: Any) -> list[str]:
    if path[:2] == ("data", "datasets"):
        path, model = path[3:], DatasetConfig
    for part in path:
        field = model.model_fields.get(str(part)) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return list(model.model_fields) if model else []


def _hint(path: str, value: Any, known: list[str], config: Mapping[str, Any]) -> str:
    """What to write in place of an unknown key."""
    section, key = path.partition(".")[0], path.rpartition(".")[2]
    answer, near = answer_for(key, value, config), difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    # another trainer's key of training is less likely where models answer and are judged
    elsewhere = section in ("generate", "judge", "pairs") and f"`{section}." not in (answer or "")
    if answer and not (near and elsewhere):
        return answer
    if near:
        return f"Did you mean '{near[0]}'?"
    sections = [name for name in Recipe.model_fields if key in _known_keys((name,), Recipe)]
    if sections:
        return f"Did you mean {' or '.join(f'{name}.{key}' for name in sections)}?"
    return f"Known keys: {', '.join(known)}."


def _as_recipe(tree: Mapping[str, Any], where: str) -> str:
    """Another trainer's configuration as a recipe, and what of it is not needed."""
    found = translate(tree, Recipe.model_fields)
    recipe: dict[str, Any] = {}
    needed = {
        "name": _NAME_LIKE.sub("-", Path(where).stem).strip("-._") or "mine",
        "model.path": "...",
        **({} if "data.datasets" in found.settings else {"data.path": "..."}),
    }
    for key, value in sorted((needed | found.settings).items(), key=lambda item: item[0].count(".")):
        section = recipe
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    order = [name for name in Recipe.model_fields if name in recipe]
    lines = [
        f"{where} is a configuration of {found.trainer}. As a recipe it reads:",
        "",
        yaml.safe_dump({name: recipe[name] for name in order}, sort_keys=False, allow_unicode=True),
        "train.global_batch_size counts all GPUs. What the recipe does not hold:"
        if found.notes or found.unknown
        else "",
        *(f"  {', '.join(keys)}: {answer}" for answer, keys in found.notes.items()),
        *([f"  {', '.join(found.unknown)}: not known here."] if found.unknown else []),
    ]
    return "\n".join(lines).rstrip()
