"""A recipe: what a run is made of, as pydantic models. Checked before anything heavy is imported."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from eval.judge.config import JudgeConfig
from otpo.errors import UserError
from otpo.methods.spec import MethodSpec, resolve

WORLD_PREFIX = "world:"  # a path inside the prepared world's folder; `world:judge` is the address of its judge


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values do not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraConfig(Section):
    """Adapters beside frozen weights (https://arxiv.org/abs/2106.09685); names and meaning are those of peft."""

    r: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = Field("all-linear", description="ends of names of modules, or a regex")

    @model_validator(mode="after")
    def _some_modules(self) -> LoraConfig:
        if not self.target_modules:
            raise ValueError("target_modules is empty: name modules, for example [q_proj, v_proj], or set all-linear")
        return self


class ModelConfig(Section):
    """The policy before training; it is also the reference of every preference method."""

    path: str
    attn_implementation: str = "sdpa"
    lora: LoraConfig | None = Field(None, description="train adapters alone, in `base` too; `{}` takes every default")
    quantization: Literal["none", "4bit"] = Field("none", description="of the frozen weights beside adapters (QLoRA)")

    @model_validator(mode="after")
    def _only_adapters_train_in_4_bits(self) -> ModelConfig:
        if self.quantization != "none" and self.lora is None:
            raise ValueError(
                f"quantization is {self.quantization}, and such weights cannot be trained: set model.lora={{}} to train"
                " adapters beside them"
            )
        return self


class PairsConfig(Section):
    """On-policy preference pairs: several answers a prompt, scored, best against worst."""

    prompts: str
    n: int = Field(8, ge=2)
    per_prompt: int = Field(1, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(512, ge=1)
    seed: int = 0
    limit: int | None = Field(None, ge=1)
    scorer: JudgeConfig = JudgeConfig(protocol="rating")


class DataConfig(Section):
    """The preference pairs and how they become tokens."""

    path: str | None = None
    split: str = "train"
    template: Literal["auto", "chat"] = "auto"
    max_length: int = Field(1024, ge=8)
    max_prompt_length: int | None = Field(None, ge=1)
    truncation: Literal["keep_start", "drop"] = "keep_start"
    validation: float = Field(0.05, ge=0, description="a fraction below 1, or a number of pairs")
    limit: int | None = Field(None, ge=2)


class TrainConfig(Section):
    """One optimisation run. A label under `methods` (and `base`) may override any of these keys."""

    max_steps: int | None = Field(None, ge=1)
    epochs: float = Field(1.0, gt=0)
    learning_rate: float = Field(5e-7, gt=0)
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    global_batch_size: int = Field(128, ge=1)
    micro_batch_size: int = Field(4, ge=1)
    micro_batch_tokens: int | None = Field(None, ge=1, description="by default 2,048 on a CPU, 16,384 on a GPU")
    workers: int = Field(2, ge=1)
    use_gpu: bool | Literal["auto"] = "auto"
    dtype: Literal["fp32", "bf16"] = "bf16"
    activation_checkpointing: bool = False
    torch_compile: bool = Field(False, description="layers and what is done to the vocabulary; a tenth of a step")
    seed: int = 42
    eval_every: int | None = Field(None, ge=1)
    save_every: int | None = Field(None, ge=1)
    keep_checkpoints: int = Field(1, ge=1)
    best_metric: str | None = Field(None, description="e.g. eval_loss or eval_rewards/accuracies")
    best_mode: Literal["min", "max"] = "min"
    early_stopping_patience: int | None = Field(None, ge=1)
    max_failures: int = Field(3, ge=0)

    @model_validator(mode="after")
    def _best_needs_evaluation(self) -> TrainConfig:
        if (self.best_metric or self.early_stopping_patience) and not self.eval_every:
            raise ValueError("best_metric and early_stopping_patience need train.eval_every: set how often to evaluate")
        if self.best_metric and not self.best_metric.startswith("eval_"):
            raise ValueError(
                "best_metric is a figure of an evaluation, for example eval_loss or eval_rewards/accuracies; found"
                f" '{self.best_metric}'"
            )
        if self.early_stopping_patience and not self.best_metric:
            raise ValueError("early_stopping_patience needs train.best_metric, for example eval_loss")
        return self


class GenerateConfig(Section):
    """Answers by vLLM workers."""

    tasks: dict[str, str] | list[str] = {}
    limit: int | None = Field(None, ge=1)
    backend: Literal["auto", "vllm", "transformers"] = "auto"
    workers: int = Field(1, ge=1)
    tensor_parallel_size: int = Field(1, ge=1)
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    max_model_len: int | None = Field(None, ge=8)
    template: Literal["chat", "literal"] = "chat"
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(1024, ge=1)
    seed: int = 0

    def named_tasks(self) -> dict[str, str]:
        """Task name -> known name or path; a path's name is its stem."""
        if isinstance(self.tasks, dict):
            return dict(self.tasks)
        names = {
            source if "/" not in source and "." not in source else Path(source).name.split(".")[0]: source
            for source in self.tasks
        }
        if len(names) < len(self.tasks):
            raise UserError(
                f"generate.tasks: two of {self.tasks} have the same name. Give names:"
                " `tasks: {one: a.jsonl, two: b.jsonl}`."
            )
        return names


class ReportConfig(Section):
    """The page and its intervals."""

    title: str | None = None
    bootstrap_samples: int = Field(2000, ge=100)
    seed: int = 0
    weight_pairs: int = Field(8, ge=0, description="how many pairs the page shows token weights of")


class SweepRange(Section):
    """Values between two bounds, for `random` and `optuna`."""

    low: float
    high: float
    log: bool = False
    integer: bool = False

    @model_validator(mode="after")
    def _bounds(self) -> SweepRange:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"expected low < high{', and low > 0 with log: true' if self.log else ''}")
        return self


class SweepConfig(Section):
    """Ray Tune over any `methods.*` or `train.*` key; each trial trains one label."""

    params: dict[str, list[bool | int | float | str] | SweepRange] = {}
    label: str | None = Field(None, description="which of `methods` is trained; the one that `params` names")
    search: Literal["grid", "random", "optuna"] = "grid"
    num_samples: int = Field(8, ge=1, description="trials of random and optuna; a grid tries every combination")
    metric: str = Field("win_rate", description="of the leaderboard, or of an evaluation: eval_loss, ...")
    mode: Literal["min", "max"] | None = Field(None, description="by default min for a loss, else max")
    task: str | None = Field(None, description="whose answers are judged; by default the first of generate.tasks")
    scheduler: Literal["none", "asha"] = "none"
    grace_period: int | None = Field(None, ge=1, description="steps before ASHA may stop a trial; train.eval_every")
    reduction_factor: float = Field(4, gt=1)
    max_concurrent_trials: int | None = Field(None, ge=1, description="by default as many as the cluster holds")
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        """`sweep.params.methods.otpo.reg=[0.1, 1]` on the command line arrives as nested sections."""
        if isinstance(value, dict) and isinstance(value.get("params"), dict):
            value = {**value, "params": dict(_leaves(value["params"]))}
        return value


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and not {"low", "high"} & set(value):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class ClusterConfig(Section):
    """Where Ray is: an address, or nothing for a cluster of this machine alone."""

    address: str | None = None


class Recipe(Section):
    """Everything a run is made of."""

    name: str
    world: dict[str, Any] | None = None
    model: ModelConfig
    base: dict[str, Any] | None = Field(None, description="supervised training first: `data` plus overrides of `train`")
    pairs: PairsConfig | None = None
    data: DataConfig = DataConfig()
    methods: dict[str, dict[str, Any]] = {}
    train: TrainConfig = TrainConfig()
    generate: GenerateConfig = GenerateConfig()
    judge: JudgeConfig = JudgeConfig()
    report: ReportConfig = ReportConfig()
    sweep: SweepConfig = SweepConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="before")
    @classmethod
    def _bare_labels(cls, value: Any) -> Any:
        """`methods: {dpo: }` means a label with every default."""
        if isinstance(value, dict) and isinstance(value.get("methods"), dict):
            value = {**value, "methods": {label: settings or {} for label, settings in value["methods"].items()}}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.model.quantization != "none" and self.train.use_gpu is False:
            raise ValueError(
                f"model.quantization is {self.model.quantization}, which needs a CUDA GPU for every training worker,"
                " but train.use_gpu is false: set model.quantization to none, or train.use_gpu to true"
            )
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"name: '{self.name}' becomes a folder: use letters, digits, '.', '_' and '-'")
        for label in self.methods:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", label) or label == "base":
                raise ValueError(
                    f"methods: the label '{label}' becomes a folder: use letters, digits, '.', '_' and '-', not 'base'"
                )
            needs = self.method(label).method.needs
            if self.model.lora and "reward_head" in needs:
                raise ValueError(
                    f"methods.{label}: a reward model is trained whole, its new head could not learn beside adapters:"
                    " train it in a recipe without model.lora"
                )
            self._check_train_of(label, f"methods.{label}")
            shared = [key for key in ("workers", "use_gpu", "max_failures") if key in self.methods[label]]
            if shared:
                raise ValueError(
                    f"methods.{label}.{shared[0]}: all methods share one group of workers: set train.{shared[0]}"
                )
        self.training_order()
        if self.base is not None:
            if not self.base.get("data"):
                raise ValueError("base: needs `data`, a file of {prompt, completion} rows")
            self._check_train_of("base", "base")
            if self.train_of("base").eval_every:
                raise ValueError(
                    "base.eval_every: the base is not evaluated, all its rows are trained on: leave it out"
                )
        evaluated = [label for label in self.methods if self.train_of(label).best_metric]
        if evaluated and not self.data.validation:
            raise ValueError(
                f"best_metric of '{evaluated[0]}' needs pairs to evaluate on: set data.validation above 0, such as 0.05"
            )
        if self.methods and self.data.path is None and self.pairs is None:
            raise ValueError("methods need preference pairs: set `data.path`, or `pairs` to sample them from the model")
        if self.methods and self.data.path is not None and self.pairs is not None:
            raise ValueError("`data.path` and `pairs` both say where the pairs come from: keep one")
        return self

    def method(self, label: str) -> MethodSpec:
        """The method behind a label, with its hyperparameters."""
        return resolve(label, {k: v for k, v in self.methods[label].items() if k not in TrainConfig.model_fields})

    def trains_rewards(self, label: str) -> bool:
        """Whether a label of `methods` is a reward model: it scores answers and writes none."""
        return label in self.methods and "reward_head" in self.method(label).method.needs

    def frozen_labels(self, label: str) -> dict[str, str]:
        """Frozen models of a label that are labels of this recipe themselves: name -> label."""
        return {name: scorer for name, scorer in self.method(label).frozen_models.items() if scorer in self.methods}

    def training_order(self) -> list[str]:
        """The labels of `methods`, each after those that it takes as scorers, otherwise as written.

        Raises:
            ValueError: labels name each other as scorers, or a scorer is neither a label nor like a path.
        """
        order: list[str] = []

        def visit(label: str, above: tuple[str, ...]) -> None:
            if label in above:
                circle = " -> ".join([*above[above.index(label) :], label])
                raise ValueError(f"methods: scorers are trained first, but these labels wait for each other: {circle}")
            for scorer in self.frozen_labels(label).values():
                visit(scorer, (*above, label))
            if label not in order:
                order.append(label)

        for label in self.methods:
            for name, scorer in self.method(label).frozen_models.items():
                if self.trains_rewards(scorer):
                    raise ValueError(
                        f"methods.{label}.{name}: '{scorer}' is a reward model, which has no log-probabilities: name a"
                        " label that trains a language model"
                    )
                if scorer not in self.methods and "/" not in scorer and not Path(scorer).exists():
                    raise ValueError(
                        f"methods.{label}.{name}: '{scorer}' is no label of `methods` ({', '.join(self.methods)})"
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
        """`train` with the label's own keys put over it; "base" is the supervised stage."""
        if label == "base":
            settings = {k: v for k, v in (self.base or {}).items() if k != "data"}
        else:
            settings = {k: v for k, v in self.methods[label].items() if k in TrainConfig.model_fields}
        # early stopping and evaluation of `train` speak of preference metrics; the base states its own
        inherited = self.train.model_dump()
        if label == "base":
            inherited |= {
                k: TrainConfig.model_fields[k].default
                for k in ("max_steps", "eval_every", "best_metric", "best_mode", "early_stopping_patience")
            }
        return TrainConfig(**{**inherited, **settings})

    def labels(self) -> list[str]:
        """Every model of the run that writes answers, the base first."""
        return ["base", *(label for label in self.methods if not self.trains_rewards(label))]


def make_recipe(tree: dict[str, Any], where: str = "recipe") -> Recipe:
    """Check a tree; every problem in one `UserError`."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join([f"{where} is not a recipe:", *(f"  {line}" for line in _explain(error))])) from error


def _explain(error: ValidationError, model: type[BaseModel] = Recipe) -> list[str]:
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _known_keys(problem["loc"][:-1], model)
            near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.4)
            hint = f" Did you mean '{near[0]}'?" if near else f" Known keys: {', '.join(known)}."
            lines.append(f"unknown key '{path}'.{hint}")
        elif problem["type"] == "missing":
            lines.append(f"'{path}' is needed and missing.")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            found = "" if problem["type"] == "value_error" else f", found {problem['input']!r}"
            lines.append(f"{path + ': ' if path else ''}{message}{found}")
    return lines


def _known_keys(path: tuple[int | str, ...], model: Any) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part)) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
    return list(model.model_fields) if model else []
