"""The stages of a run: base training, on-policy pairs, every method, answers, verdicts, report.

Each stage reads files and leaves files. What is finished is skipped, what was interrupted goes on, and Ray is only
started when a stage needs it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from eval.config import JudgeConfig
from otpo.errors import UserError
from otpo.identity import source_identity
from pipeline.config import WORLD_PREFIX, ModelConfig, Recipe, identity
from pipeline.manifest import open_run

if TYPE_CHECKING:
    from eval.tasks import Task
    from pipeline.generate import EnginePool

Show = Callable[[str, int, int, str], None]
"""Progress of one piece of work: (what, done, total, a few words)."""


class World(Protocol):
    """A prepared world with known truth (`jobs/small_world`): what `world:` in a recipe stands for."""

    def prepare(self, folder: Path, settings: dict[str, Any]) -> None:
        """Write the world's files; does nothing where they are there already."""

    def serve(self, folder: Path) -> AbstractContextManager[str]:
        """Run the world's judge; gives its URL."""

    def measure(self, run: Path, folder: Path, labels: list[str], methods: dict[str, Any]) -> None:
        """Write `world.json` into the run's folder: what only a known truth allows to measure."""


def run(
    recipe: Recipe, folder: Path, *, world: World | None, show: Show, until: str = "report", redo: bool = False
) -> Run:
    """Do what of a recipe is not done yet.

    Args:
        folder: of the run. world: behind the recipe's `world:` values. until: last stage: "train" or "report".
        redo: accept a changed recipe under an old name.

    Raises:
        UserError: wrong input; nothing was started. WorkError: a stage failed; the same call goes on from there.
    """
    this = Run(recipe, folder.absolute(), world, show, redo)
    with this.opened():
        this.base()
        this.pairs()
        this.train()
        if until == "report":
            this.generate()
            this.judge()
            this.measure()
            this.report()
    return this


class Run:
    """A recipe in its folder, stage by stage."""

    def __init__(self, recipe: Recipe, folder: Path, world: World | None, show: Show, redo: bool):
        if recipe.world is not None and world is None:
            raise UserError(
                "The recipe has a `world`, which only `otpo run`, `train`, `sweep` and `pairs` know how to prepare."
            )
        self.recipe, self.folder, self.world, self.show = recipe, folder, world, show
        self.inputs_of: dict[str, Any] = {}
        self.did: list[str] = []
        self.pool: EnginePool | None = None
        self.manifest = open_run(recipe, folder, redo=redo)
        if world is not None and recipe.world is not None:
            world.prepare(self.world_folder, recipe.world)
        self._preflight()

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

    @cached_property
    def tasks(self) -> dict[str, Task]:
        """The prompts to answer."""
        from eval.tasks import load_task

        return {
            name: load_task(self.resolve(source), name, self.recipe.generate.limit)
            for name, source in self.recipe.generate.named_tasks().items()
        }

    # ---- stages ----

    def base(self) -> None:
        """Supervised training of the base, if the recipe has one."""
        if self.recipe.base is None:
            self.inputs_of["base"] = {"model": source_identity(self.start.path)}
            return
        source = self.resolve(self.recipe.base["data"])
        inputs = {
            "model": source_identity(self.resolve(self.recipe.model.path)), "rows": source_identity(source),
            "train": self._training("base"), "data": self._tree["data"],
        }  # fmt: skip
        self.inputs_of["base"] = inputs
        if not self._needs("base", inputs):
            return
        model = self.recipe.model.model_copy(update={"path": self.resolve(self.recipe.model.path)})
        with self._doing("base", inputs, [self.model_of("base")], [self.folder / "models" / "base"]):
            self._fit(["base"], model=model, source=source)

    def pairs(self) -> None:
        """On-policy preference pairs from the base, if the recipe asks for them."""
        settings = self.recipe.pairs
        if settings is None:
            return
        source = self.resolve(settings.prompts)
        inputs = {
            "pairs": self._tree["pairs"],
            "prompts": source_identity(source),
            "base": self.inputs_of["base"],
            "engine": self._engine,
        }
        self.inputs_of["pairs"] = inputs
        out = self.folder / "pairs" / "pairs.jsonl"
        if not self._needs("pairs", inputs):
            return
        from eval.tasks import load_task
        from pipeline.engine import Sampling
        from pipeline.pairs import sample_pairs

        sampling = Sampling(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
            n=settings.n,
            seed=settings.seed,
        )
        with self._doing("pairs", inputs, [out]) as figures, self.serving(settings.scorer) as scorer:
            report = sample_pairs(
                self.start.path, load_task(source, "pairs", settings.limit), sampling, self.engines(), scorer, out,
                per_prompt=settings.per_prompt, progress=self._counting,
            )  # fmt: skip
            figures["report"] = report

    def train(self) -> None:
        """Every method of the recipe, in one worker group."""
        source = (
            str(self.folder / "pairs" / "pairs.jsonl")
            if self.recipe.pairs
            else self.resolve(self.recipe.data.path or "")
        )
        todo = []
        for label in self.recipe.methods:
            rows = self.inputs_of["pairs"] if self.recipe.pairs else source_identity(source)
            spec = self.recipe.method(label)
            inputs = {
                "base": self.inputs_of["base"], "rows": rows, "train": self._training(label), "data": self._tree["data"],
                "method": [spec.method.name, spec.hyperparameters],
            }  # fmt: skip
            self.inputs_of[f"train/{label}"] = inputs
            if self._needs(f"train/{label}", inputs):
                todo.append(label)
        if not todo:
            return
        if self.pool is not None and self.pool.config.device == "gpu":
            self.close_engines()  # training wants the GPUs
        for label in todo:
            self._clear(f"train/{label}", self.inputs_of[f"train/{label}"], [self.folder / "models" / label])
        with self.manifest.doing(
            f"train/{todo[0]}", self.inputs_of[f"train/{todo[0]}"], [self.model_of(todo[0])]
        ) as figures:
            figures["trained_together"] = todo
            figures["tokens"] = tokens = self._fit(todo, model=self.start, source=source)
        for label in todo[1:]:
            with self.manifest.doing(
                f"train/{label}", self.inputs_of[f"train/{label}"], [self.model_of(label)]
            ) as figures:
                figures |= {"trained_together": todo, "tokens": tokens}

    def generate(self) -> None:
        """Answers of every model to every task."""
        from pipeline.engine import Sampling

        settings = self.recipe.generate
        sampling = Sampling(
            temperature=settings.temperature, top_p=settings.top_p, max_tokens=settings.max_tokens, seed=settings.seed
        )
        for label in self.recipe.labels():
            model_inputs = self.inputs_of["base" if label == "base" else f"train/{label}"]
            for name, task in self.tasks.items():
                prompts = source_identity(task.source)
                inputs = {
                    "model": model_inputs,
                    "generate": self._sampling,
                    "engine": self._engine,
                    "task": [name, prompts, len(task.prompts)],
                }
                stage = f"generate/{label}/{name}"
                self.inputs_of[stage] = inputs
                if not self._needs(stage, inputs):
                    continue
                out = self.folder / "models" / label / name
                with self._doing(stage, inputs, [out / "model_outputs.json"]) as figures:
                    result = self.engines().generate(
                        self.model_of(label), label, task.prompts, sampling, out, settings.template,
                        progress=lambda done, total, rate, what=f"generate {label} {name}": self.show(what, done, total, f"{rate:,.0f} tokens/s"),
                    )  # fmt: skip
                    figures |= {key: result.report[key] for key in ("n", "truncated", "errors", "tokens")}

    def judge(self) -> None:
        """Verdicts on every model's answers, and the table."""
        if not self.tasks:
            return
        from eval.judge import judge, ledger, write_verdicts

        for name, task in self.tasks.items():
            reference_label, reference = self._reference(task)
            config = self.judge_config(task)
            labels = [label for label in self.recipe.labels() if label != reference_label]
            inputs = {
                "judge": self._tree["judge"] | {"protocol": config.protocol}, "reference": reference_label or source_identity(str(reference)),
                "answers": {label: self.inputs_of[f"generate/{label}/{name}"] for label in self.recipe.labels()},
            }  # fmt: skip
            self.inputs_of[f"judge/{name}"] = inputs
            folder = self.folder / "judge" / name
            if not labels or not self._needs(f"judge/{name}", inputs):
                continue
            import pandas as pd

            reference_rows = self._reference_rows(task, reference_label, reference)
            with (
                self._doing(f"judge/{name}", inputs, [folder / "verdicts.parquet"]) as figures,
                self.serving(config) as judge_config,
            ):
                frames = [
                    judge(
                        self._outputs(label, name), reference_rows, judge_config, self.folder / "judge" / "store.sqlite", name,
                        progress=lambda done, total, failed, what=f"judge {label} {name}": self.show(what, done, total, f"{failed} failed"),
                        subset=self.recipe.generate.limit is not None,
                    )
                    for label in labels
                ]  # fmt: skip
                frame = pd.concat(frames, ignore_index=True)
                write_verdicts(frame, folder / "verdicts.parquet")
                (folder / "reference.json").write_text(json.dumps(reference_rows, ensure_ascii=False, indent=1))
                figures |= ledger(frame)

    def measure(self) -> None:
        """What a world with known truth allows to measure."""
        if self.world is None or self.recipe.world is None:
            return
        inputs = {stage: value for stage, value in self.inputs_of.items() if stage.startswith(("generate/", "train/"))}
        self.inputs_of["truth"] = inputs
        if self._needs("truth", inputs):
            methods = {label: self.recipe.method(label) for label in self.recipe.methods}
            with self._doing("truth", inputs, [self.folder / "world.json"]):
                self.show("known truth", 0, 1, "")
                self.world.measure(self.folder, self.world_folder, self.recipe.labels(), methods)
                self.show("known truth", 1, 1, "")

    def report(self) -> None:
        """Token weights for the page, the table, the page."""
        inputs = {"stages": self.inputs_of, "report": self._tree["report"], "title": self.recipe.name}
        page = self.folder / "report.html"
        if not self._needs("report", inputs):
            return
        from eval.report import build

        with self._doing("report", inputs, [page]):
            self.show("report", 0, 2, "token weights")
            self._write_weights()
            self.show("report", 1, 2, "page")
            self._write_board()
            self.manifest.save()
            build([self.folder], self.folder)
            self.show("report", 2, 2, "")

    # ---- parts ----

    def engines(self) -> EnginePool:
        """The run's engines, loaded once and kept for every model."""
        if self.pool is None:
            from pipeline.cluster import connect
            from pipeline.generate import EnginePool

            connect(self.recipe.cluster.address)
            self.pool = EnginePool(self.engine_config(), self.start.path, self.recipe.generate.template)
        return self.pool

    def engine_config(self):  # noqa: ANN201 - EngineConfig is imported late: it is not needed to skip everything
        """The engines that the recipe asks for."""
        from pipeline.engine import EngineConfig

        g = self.recipe.generate
        return EngineConfig(
            backend=g.backend, dtype=g.dtype, max_model_len=g.max_model_len, workers=g.workers,
            tensor_parallel_size=g.tensor_parallel_size, gpu_memory_utilization=g.gpu_memory_utilization,
        )  # fmt: skip

    def judge_config(self, task: Task) -> JudgeConfig:
        """The judge of a task: summaries have a protocol of their own unless the recipe names one."""
        protocol = (
            "summary"
            if task.kind == "summarization" and self.recipe.judge.protocol == "preference"
            else self.recipe.judge.protocol
        )
        return self.recipe.judge.model_copy(update={"protocol": protocol})

    @contextmanager
    def serving(self, config: JudgeConfig) -> Iterator[JudgeConfig]:
        """The judge's settings with an address that answers: the world's judge is started for the time of the body."""
        ours = (config.url or "").startswith(WORLD_PREFIX) and self.world is not None
        with self.world.serve(self.world_folder) if ours and self.world else nullcontext(config.url) as url:
            yield config.model_copy(update={"url": url})

    def _preflight(self) -> None:
        """Everything that can be checked before a worker starts."""
        recipe = self.recipe
        if not recipe.base:
            path = Path(self.resolve(recipe.model.path))
            if path.is_dir() and not (path / "config.json").is_file():
                raise UserError(f"model.path: {path} is no model folder: expected a config.json in it.")
        for key, source in self._sources():
            if (source.startswith(WORLD_PREFIX) or "/" in source or "." in source) and not Path(
                self.resolve(source)
            ).exists():
                if source.startswith((WORLD_PREFIX, "/", "./", "../", "~")) or Path(source).suffix:
                    raise UserError(
                        f"{key}: there is no file or folder '{source}'. Give a path that exists, or a hub name."
                    )
        _ = self.tasks
        if self.recipe.judge.url and self.tasks and not self._all_judged():
            self._check_judge(recipe.judge)
        if recipe.pairs and not self._stage_exists("pairs"):
            if not recipe.pairs.scorer.url:
                raise UserError("pairs.scorer.url is needed: the address of the judge that rates the answers.")
            self._check_judge(recipe.pairs.scorer)

    def _check_judge(self, config: JudgeConfig) -> None:
        if not config.model:
            raise UserError("judge.model is needed: the name of the judge's model as its server knows it.")
        if not (config.url or "").startswith(WORLD_PREFIX):
            from eval.judge import check

            check(config)

    def _sources(self) -> Iterator[tuple[str, str]]:
        yield "model.path", self.recipe.model.path
        if self.recipe.base:
            yield "base.data", self.recipe.base["data"]
        if self.recipe.data.path:
            yield "data.path", self.recipe.data.path
        if self.recipe.pairs:
            yield "pairs.prompts", self.recipe.pairs.prompts
        for name, source in self.recipe.generate.named_tasks().items():
            yield f"generate.tasks.{name}", source

    def _stage_exists(self, stage: str) -> bool:
        return stage in self.manifest.tree["stages"]

    def _all_judged(self) -> bool:
        return all(self._stage_exists(f"judge/{name}") for name in self.tasks)

    def _fit(self, labels: list[str], *, model: ModelConfig, source: str) -> str:
        """Train the labels in one worker group; gives the file of token ids that they were trained on."""
        from pipeline.cluster import connect
        from pipeline.train import fit, make_job, prepare_tokens

        supervised = labels == ["base"]
        tokens = prepare_tokens(self.recipe, self.folder, model=model.path, source=source, supervised=supervised)
        connect(self.recipe.cluster.address)
        jobs = [
            make_job(
                self.recipe, self.folder, label, model=model, tokens=tokens, scorers=self.folder.parent / "scorers"
            )
            for label in labels
        ]
        group = self.recipe.train_of("base") if supervised else self.recipe.train
        fit(jobs, self.folder, name="base" if supervised else "methods", train=group, show=self.show)
        return tokens.train

    def _reference(self, task: Task) -> tuple[str | None, str | None]:
        """(label, None) where a model of the run is the reference, else (None, file); (None, None) is the task's own."""
        reference = self.recipe.judge.reference
        if reference in self.recipe.labels():
            return reference, None
        if reference:
            return None, self.resolve(reference)
        return (None, None) if task.prompts and all(p.reference for p in task.prompts) else ("base", None)

    def _reference_rows(self, task: Task, label: str | None, file: str | None) -> list[dict[str, Any]]:
        from eval.tasks import load_outputs

        if label:
            return self._outputs(label, task.name)
        if file:
            return load_outputs(file)
        return [
            {"instruction": p.instruction, "output": p.reference, "generator": "reference", "dataset": p.dataset}
            for p in task.prompts
        ]

    def _outputs(self, label: str, task: str) -> list[dict[str, Any]]:
        return json.loads((self.folder / "models" / label / task / "model_outputs.json").read_text())

    def _write_weights(self) -> None:
        """Token weights of the trained models on a few of the pairs, for the page."""
        if not self.recipe.methods or not self.recipe.report.weight_pairs:
            return
        import ray

        from otpo.batches import load_tokens
        from otpo.weigh import weigh
        from pipeline.cluster import connect

        connect(self.recipe.cluster.address)
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        if gpus:
            self.close_engines()
        # on the cluster, because the driver's machine may be too small for the model
        task = ray.remote(num_cpus=0, num_gpus=gpus)(weigh)
        rows: list[dict[str, Any]] = []
        for label in self.recipe.methods:
            spec = self.recipe.method(label)
            if spec.method.weights != "uniform":
                tokens = self.manifest.tree["stages"][f"train/{label}"]["tokens"]
                items = load_tokens(tokens)[: self.recipe.report.weight_pairs]
                rows += ray.get(task.remote(str(self.model_of(label)), items, spec))
        if rows:
            (self.folder / "weights.json").write_text(json.dumps(rows, ensure_ascii=False))

    def _write_board(self) -> None:
        from eval.leaderboard import leaderboard, write_leaderboard

        import pandas as pd

        boards = []
        for name, task in self.tasks.items():
            verdicts = self.folder / "judge" / name / "verdicts.parquet"
            if verdicts.exists():
                reference = json.loads((self.folder / "judge" / name / "reference.json").read_text())
                outputs = {label: self._outputs(label, name) for label in self.recipe.labels()}
                calibration = self.recipe.judge.calibration
                boards.append(
                    leaderboard(
                        pd.read_parquet(verdicts), outputs, reference, judge=self.recipe.judge.model or "", protocol=self.judge_config(task).protocol,
                        calibration=Path(calibration) if calibration else None, seed=self.recipe.report.seed,
                    )
                )  # fmt: skip
        if boards:
            write_leaderboard(pd.concat(boards, ignore_index=True), self.folder / "leaderboard.csv")

    @cached_property
    def _tree(self) -> dict[str, Any]:
        return identity(self.recipe)

    def _training(self, label: str) -> dict[str, Any]:
        train = self.recipe.train_of(label).model_dump(mode="json")
        return {key: value for key, value in train.items() if key not in ("max_failures", "keep_checkpoints")}

    @property
    def _engine(self) -> dict[str, Any]:
        return {key: self._tree["generate"][key] for key in ("backend", "dtype", "max_model_len", "template")}

    @property
    def _sampling(self) -> dict[str, Any]:
        return {key: self._tree["generate"][key] for key in ("temperature", "top_p", "max_tokens", "seed")}

    def _counting(self, what: str, done: int, total: int, text: str = "") -> None:
        self.show(what, done, total, text)

    def _needs(self, stage: str, inputs: Any) -> bool:
        return not self.manifest.is_done(stage, inputs)

    @contextmanager
    def _doing(
        self, stage: str, inputs: Any, outputs: list[Path], leaves: list[Path] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Do a stage; `leaves` is everything it writes, where that is more than its outputs."""
        self._clear(stage, inputs, leaves or outputs)
        with self.manifest.doing(stage, inputs, outputs) as figures:
            yield figures
        self.did.append(stage)

    def _clear(self, stage: str, inputs: Any, leaves: list[Path]) -> None:
        """Remove what other inputs left for a stage; what an interrupted attempt at these inputs left stays."""
        if self.manifest.starts(stage, inputs):
            for path in leaves:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
