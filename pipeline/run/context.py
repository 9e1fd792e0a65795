"""A recipe in its folder: where things are, what is done, and the parts that several stages share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from eval.judge.config import JudgeConfig
from otpo.errors import UserError
from otpo.identity import source_identity
from pipeline.judge.reward_model import check_reward_model
from pipeline.progress import Progress
from pipeline.recipe import WORLD_PREFIX, ModelConfig, Recipe, identity
from pipeline.run.manifest import open_run

if TYPE_CHECKING:
    from eval.tasks import Task
    from pipeline.generate.engine import EngineConfig
    from pipeline.generate.pool import EnginePool
    from pipeline.train.tokens import Tokens


class World(Protocol):
    """A prepared world with known truth (`jobs/small_world`): what `world:` in a recipe stands for."""

    def prepare(self, folder: Path, settings: dict[str, Any]) -> None:
        """Write the world's files; does nothing where they are there already."""

    def serve(self, folder: Path) -> AbstractContextManager[str]:
        """Run the world's judge; gives its URL."""

    def measure(self, run: Path, folder: Path, labels: list[str], methods: dict[str, Any]) -> None:
        """Write `world.json` into the run's folder: what only a known truth allows to measure."""


class Context:
    """Everything about a run that is not a stage. Making one checks all that can be checked before a worker starts.

    Attributes:
        inputs_of: stage -> what it was or will be made from.
        did: stages that this call did.
        notes: sentences for the person at the end, about what is finished but not whole.
        spent_usd: paid to the judge by this call.
    """

    def __init__(self, recipe: Recipe, folder: Path, world: World | None, show: Progress, redo: bool):
        self.recipe, self.folder, self.world, self.show, self.redo = recipe, folder, world, show, redo
        self.inputs_of: dict[str, Any] = {}
        self.did: list[str] = []
        self.notes: list[str] = []
        self.spent_usd = 0.0
        self.pool: EnginePool | None = None
        self._tokens: dict[bool, Tokens] = {}
        self.manifest = open_run(recipe, folder, redo=redo)
        if recipe.world is not None:
            if world is None:
                raise UserError(
                    "The recipe has a `world`, and nothing here knows how to prepare it: use the `otpo` command."
                )
            world.prepare(self.world_folder, recipe.world)
        self._check_sources()
        self._check_adapters()
        self._check_layers()
        self._check_data()
        if recipe.pairs and "pairs" not in self.manifest.tree["stages"]:
            self.check_judge("pairs.scorer", recipe.pairs.scorer)

    # ---- where things are ----

    @property
    def world_folder(self) -> Path:
        """Where the world's files are."""
        return self.folder / "world"

    def resolve(self, source: str) -> str:
        """A source of the recipe as a path or name: `world:x` lies in the world's folder."""
        if source.startswith(WORLD_PREFIX):
            return str(self.world_folder / source.removeprefix(WORLD_PREFIX))
        return str(Path(source).absolute()) if Path(source).exists() else source

    @cached_property
    def start(self) -> ModelConfig:
        """Where every method starts: the base trained here, or the recipe's model."""
        path = str(self.model_of("base")) if self.recipe.base else self.resolve(self.recipe.model.path)
        return self.recipe.model.model_copy(update={"path": path})

    def model_of(self, label: str) -> Path:
        """Folder of a model of the run."""
        if label == "base" and not self.recipe.base:
            return Path(self.resolve(self.recipe.model.path))
        return self.folder / "models" / label / "model"

    def frozen_models_of(self, label: str) -> dict[str, str]:
        """The frozen models that a label's weight rule reads: name -> folder or hub name. Most read none."""
        named = {
            name: str(self.model_of(scorer)) if scorer in self.recipe.methods else self.resolve(scorer)
            for name, scorer in self.recipe.method(label).frozen_models.items()
        }
        return {"reference": self.start.path, **named} if named else {}

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The prompts to answer."""
        from eval.tasks import load_task

        named = self.recipe.generate.named_tasks().items()
        return {name: load_task(self.resolve(source), name, self.recipe.generate.limit) for name, source in named}

    @property
    def pairs_file(self) -> str:
        """The preference pairs: the recipe's, or those sampled here."""
        sampled = self.folder / "pairs" / "pairs.jsonl"
        return str(sampled) if self.recipe.pairs else self.resolve(self.recipe.data.path or "")

    def tokens(self, *, supervised: bool) -> Tokens:
        """Token ids of the base's rows, else of the pairs. The base has the tokenizer of the model it starts from."""
        if supervised not in self._tokens:
            from pipeline.train.tokens import prepare_tokens

            source = self.resolve((self.recipe.base or {})["data"]) if supervised else self.pairs_file
            model = self.resolve(self.recipe.model.path)
            self._tokens[supervised] = prepare_tokens(
                self.recipe, self.folder, model=model, source=source, supervised=supervised
            )
            report = self._tokens[supervised].report
            left_out = ", ".join(f"{len(rows)} {reason}" for reason, rows in report.problems.items())
            what = f"{report.counted} of {Path(source).name}"
            self.show(what, report.n_usable, report.n_groups, f"usable; left out: {left_out}" if left_out else "usable")
        return self._tokens[supervised]

    # ---- what is done ----

    @cached_property
    def tree(self) -> dict[str, Any]:
        """The recipe without the keys that cannot change a result: what inputs of stages are made of."""
        return identity(self.recipe)

    @property
    def reading(self) -> dict[str, Any]:
        """How rows become tokens. Which rows is told by a file's content, wherever the file lies."""
        return {key: value for key, value in self.tree["data"].items() if key != "path"}

    def needs(self, stage: str, inputs: Any) -> bool:
        """Note a stage's inputs; whether it has to be done.

        Raises:
            UserError: it was finished from other inputs although the recipe is the same (an edited data file, another
                version's defaults): what it left is not thrown away without being asked for.
        """
        self.inputs_of[stage] = inputs
        changed = self.manifest.is_stale(stage, inputs)
        if changed and not self.redo and stage.startswith(("base", "pairs", "train/", "generate/")):
            raise UserError(
                f"{self.folder}: the stage '{stage}' is finished, but what it was made from has changed since (a file's"
                " content, or a default of this version). Two ways out: take another name (name=...), or add --redo to"
                " do it again in place."
            )
        return not self.manifest.is_done(stage, inputs)

    @contextmanager
    def doing(self, stage: str, outputs: list[Path], leaves: list[Path] | None = None) -> Iterator[dict[str, Any]]:
        """Do a stage; `leaves` is everything it writes, where that is more than its outputs."""
        self.clear(stage, leaves or outputs)
        with self.manifest.doing(stage, self.inputs_of[stage], outputs) as figures:
            yield figures
        self.did.append(stage)

    def clear(self, stage: str, leaves: list[Path]) -> None:
        """Remove what other inputs left for a stage; what an interrupted attempt at these inputs left stays."""
        if self.manifest.starts(stage, self.inputs_of[stage]):
            for path in leaves:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    # ---- parts that stages share ----

    def engines(self) -> EnginePool:
        """The run's engines, loaded once and kept for every model."""
        if self.pool is None:
            from pipeline.cluster.connect import connect
            from pipeline.generate.pool import EnginePool

            connect(self.recipe.cluster.address)
            self.pool = EnginePool(self.engine_config(), self.start.path, self.recipe.generate.template)
        return self.pool

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Close the engines at the end, however it comes."""
        try:
            yield
        finally:
            self.close_engines()

    def close_engines(self) -> None:
        """End the engines; the next stage that needs them starts them again."""
        if self.pool is not None:
            self.pool.close()
            self.pool = None

    def engine_config(self) -> EngineConfig:
        """The engines that the recipe asks for."""
        from pipeline.generate.engine import EngineConfig

        names = ("backend", "dtype", "max_model_len", "workers", "tensor_parallel_size", "gpu_memory_utilization")
        return EngineConfig(**{name: getattr(self.recipe.generate, name) for name in names})

    def judge_config(self, task: Task) -> JudgeConfig:
        """The judge of a task: summaries have a protocol of their own unless the recipe names one."""
        judge = self.recipe.judge
        summary = task.kind == "summarization" and judge.protocol == "preference"
        return judge.model_copy(update={"protocol": "summary"}) if summary else judge

    @contextmanager
    def serving(self, config: JudgeConfig) -> Iterator[JudgeConfig]:
        """The judge's settings with an address that answers: a world's judge is started for the time of the body."""
        rewards = self.reward_model(config)
        ours = self.world if (config.url or "").startswith(WORLD_PREFIX) else None
        with ours.serve(self.world_folder) if ours else nullcontext(config.url) as url:
            yield config.model_copy(update={"url": url, "reward_model": rewards})

    def reward_model(self, config: JudgeConfig) -> str | None:
        """Folder or hub name of the reward model that judges, if one does."""
        name = config.reward_model
        if name is None:
            return None
        return str(self.model_of(name)) if name in self.recipe.methods else self.resolve(name)

    def inputs_of_judge(self, config: JudgeConfig) -> dict[str, Any]:
        """What a reward model that judges was made from; nothing of a judge behind an address."""
        path = self.reward_model(config)
        if path is None:
            return {}
        return {"reward_model": self.inputs_of.get(f"train/{config.reward_model}") or source_identity(path)}

    # ---- before anything starts ----

    def _check_sources(self) -> None:
        recipe = self.recipe
        sources = {f"generate.tasks.{name}": source for name, source in recipe.generate.named_tasks().items()}
        sources |= {"model.path": recipe.model.path}
        if recipe.base:
            sources["base.data"] = recipe.base["data"]
        if recipe.data.path:
            sources["data.path"] = recipe.data.path
        if recipe.pairs:
            sources["pairs.prompts"] = recipe.pairs.prompts
        for label in recipe.methods:
            ours = recipe.frozen_labels(label)
            scorers = recipe.method(label).frozen_models.items()
            sources |= {f"methods.{label}.{name}": scorer for name, scorer in scorers if name not in ours}
        for key, source in sources.items():
            # a hub name is "owner/name": anything that starts or ends like a path must be one
            looks_local = source.startswith((WORLD_PREFIX, "/", "./", "../", "~")) or Path(source).suffix in _SUFFIXES
            if looks_local and not Path(self.resolve(source)).exists():
                raise UserError(
                    f"{key}: there is no file or folder '{source}'. Give a path that exists, or a hub name."
                )
        model = Path(self.resolve(recipe.model.path))
        if model.is_dir() and not (model / "config.json").is_file():
            raise UserError(f"model.path: {model} is no model folder: expected a config.json in it.")

    def _check_adapters(self) -> None:
        model, stages = self.recipe.model, self.manifest.tree["stages"]
        if model.lora is None or all(f"train/{label}" in stages for label in self.recipe.methods):
            return
        import torch

        from otpo.models.adapters import check_adapters, check_quantization

        elsewhere = self.recipe.cluster.address or os.environ.get("RAY_ADDRESS")  # whose GPUs are counted later
        check_quantization(model.quantization, gpu=bool(elsewhere) or torch.cuda.is_available())
        check_adapters(self.resolve(model.path), model.lora.model_dump())

    def _check_layers(self) -> None:
        stages, methods = self.manifest.tree["stages"], self.recipe.methods
        chosen = {label: self.recipe.method(label).layer for label in methods if f"train/{label}" not in stages}
        if all(layer == -1 for layer in chosen.values()):
            return
        from otpo.models.policy import check_layer

        for label, layer in chosen.items():
            check_layer(f"methods.{label}.layer", self.resolve(self.recipe.model.path), layer)

    def _check_data(self) -> None:
        stages = self.manifest.tree["stages"]
        if self.recipe.base and "base" not in stages:
            self.tokens(supervised=True)
        if self.recipe.data.path and not all(f"train/{label}" in stages for label in self.recipe.methods):
            self.tokens(supervised=False)

    def check_judge(self, key: str, config: JudgeConfig) -> None:
        """Raises UserError where a judge cannot be asked; `key` is its section of the recipe."""
        if config.reward_model in self.recipe.methods:
            if key == "judge" and self.recipe.trains_rewards(config.reward_model):
                return
            raise UserError(
                f"{key}.reward_model: expected a reward model that is there by then, found the label"
                f" '{config.reward_model}'. Name a label of `method: reward-model` (of judge only), or a folder."
            )
        if config.reward_model:
            return check_reward_model(f"{key}.reward_model", self.resolve(config.reward_model))
        if not config.url or not config.model:
            raise UserError(
                f"{key}.url and {key}.model are needed: the server's address, and the model as it knows it."
            )
        if not config.url.startswith(WORLD_PREFIX):
            from eval.judge.check import check

            check(config)


_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".gz", ".yaml")
