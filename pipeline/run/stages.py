"""The stages of a run: base training, on-policy pairs, every method, answers, verdicts, known truth, report.

Each stage reads files and leaves files. What is finished is skipped, what was interrupted goes on, and Ray is only
started when a stage needs it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otpo.errors import UserError
from otpo.identity import source_identity
from pipeline.progress import Progress
from pipeline.recipe import EXECUTION_KEYS_OF_TRAINING, ModelConfig, Recipe
from pipeline.run.board import write_board, write_weights
from pipeline.run.context import Context, World
from pipeline.run.metrics import nearly_uniform, seconds_of_steps

if TYPE_CHECKING:
    from eval.judge.config import JudgeConfig
    from eval.tasks import Task
    from pipeline.judge.reward_model import RewardJudge

Rows = list[dict[str, Any]]


def run(
    recipe: Recipe, folder: Path, *, world: World | None, show: Progress, until: str = "report", redo: bool = False
) -> Run:
    """Do what of a recipe is not done yet.

    Args:
        folder: of the run.
        world: behind the recipe's `world:` values.
        show: called with the progress of each piece of work.
        until: last stage: "train" or "report".
        redo: accept a changed recipe under an old name.

    Raises:
        UserError: wrong input; nothing was started.
        WorkError: a stage failed; the same call goes on from there.
    """
    this = Run(recipe, folder.absolute(), world, show, redo)
    if until == "report":
        this.check_answering()
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


class Run(Context):
    """A recipe in its folder, stage by stage."""

    def check_answering(self) -> None:
        """Find out, before anything is trained, whether answers and verdicts can be had at all.

        Raises:
            UserError: an engine cannot serve the model, the reference answers other instructions, or no judge answers.
        """
        stages, recipe = self.manifest.tree["stages"], self.recipe
        if not self.tasks or all(f"judge/{name}" in stages for name in self.tasks):
            return
        from eval.outputs import match_outputs
        from pipeline.generate.pool import preflight

        preflight(self.resolve(recipe.model.path), self.engine_config(), recipe.generate.template)
        for task in self.tasks.values():
            if self._reference(task)[1]:
                answers = [{"instruction": prompt.instruction, "output": "?"} for prompt in task.prompts]
                match_outputs(answers, self._reference_rows(task), subset=recipe.generate.limit is not None)
        if recipe.judge.url or recipe.judge.reward_model:
            self.check_judge("judge", recipe.judge)
        elif recipe.methods:
            raise UserError(
                "judge.url or judge.reward_model is needed to judge the answers of generate.tasks; or use `otpo train`."
            )

    def base(self) -> None:
        """Supervised training of the base, if the recipe has one."""
        if self.recipe.base is None:
            self.inputs_of["base"] = {"model": source_identity(self.start.path)}
            return
        source, model = self.resolve(self.recipe.base["data"]), self.resolve(self.recipe.model.path)
        inputs = {
            "model": source_identity(model),
            "rows": source_identity(source),
            "train": self._training("base"),
            "data": self.reading,
        }
        if self.needs("base", inputs):
            with self.doing("base", [self.model_of("base")], [self.folder / "models" / "base"]):
                self._fit(["base"], self.recipe.model.model_copy(update={"path": model}))

    def pairs(self) -> None:
        """On-policy preference pairs from the base, if the recipe asks for them."""
        settings = self.recipe.pairs
        if settings is None:
            return
        prompts = self.resolve(settings.prompts)
        inputs = {
            "pairs": {key: value for key, value in self.tree["pairs"].items() if key != "prompts"},
            "prompts": source_identity(prompts),
            "base": self.inputs_of["base"],
            "engine": self._engine,
            **self.inputs_of_judge(settings.scorer),
        }
        if not self.needs("pairs", inputs):
            return
        from eval.tasks import load_task
        from pipeline.generate.engine import Sampling
        from pipeline.generate.pairs import sample_pairs

        names = ("temperature", "top_p", "max_tokens", "n", "seed")
        sampling = Sampling(**{name: getattr(settings, name) for name in names})
        with self.doing("pairs", [self._pairs]) as figures, self.serving(settings.scorer) as scorer:
            task = load_task(prompts, "pairs", settings.limit)
            figures["report"] = sample_pairs(
                self.start.path,
                task,
                sampling,
                self.engines(),
                scorer,
                self._pairs,
                per_prompt=settings.per_prompt,
                progress=self.show,
            )

    def train(self) -> None:
        """Every method of the recipe, in one worker group."""
        todo = []
        for label in self.recipe.training_order():
            spec = self.recipe.method(label)
            inputs: dict[str, Any] = {
                "base": self.inputs_of["base"],
                "rows": self.inputs_of["pairs"] if self.recipe.pairs else source_identity(self.pairs_file),
                "train": self._training(label),
                "data": self.reading,
                "method": [spec.method.name, spec.hyperparameters],
            }
            if spec.frozen_models:
                inputs["scorers"] = {
                    name: self.inputs_of.get(f"train/{scorer}") or source_identity(self.resolve(scorer))
                    for name, scorer in spec.frozen_models.items()
                }
            if self.needs(f"train/{label}", inputs):
                self.clear(f"train/{label}", [self.folder / "models" / label])
                todo.append(label)
        if not todo:
            return
        if self.pool is not None and self.pool.config.device == "gpu":
            self.close_engines()  # training wants the GPUs
        started = time.perf_counter()
        tokens = self._fit(todo, self.start)
        seconds = time.perf_counter() - started
        steps = {label: seconds_of_steps(self.folder / "models" / label) for label in todo}
        self.notes += nearly_uniform(self.folder, todo)
        for label in todo:
            with self.doing(f"train/{label}", [self.model_of(label)]) as figures:
                share = seconds * steps[label] / max(sum(steps.values()), 1e-9)
                figures |= {"tokens": tokens[label], "trained_together": todo, "seconds": round(share, 2)}

    def generate(self) -> None:
        """Answers of every model to every task."""
        for label in self.recipe.labels():
            model = self.inputs_of["base" if label == "base" else f"train/{label}"]
            for name, task in self.tasks.items():
                inputs = {
                    "model": model,
                    "sampling": self._sampling,
                    "engine": self._engine,
                    "task": [name, source_identity(task.source), len(task.prompts)],
                }
                if self.needs(f"generate/{label}/{name}", inputs):
                    self._answer(label, task)

    def _answer(self, label: str, task: Task) -> None:
        from pipeline.generate.engine import Sampling

        out = self.folder / "models" / label / task.name

        def progress(done: int, total: int, rate: float) -> None:
            self.show(f"generate {label} {task.name}", done, total, f"{rate:,.0f} tokens/s")

        with self.doing(f"generate/{label}/{task.name}", [out / "model_outputs.json"]) as figures:
            result = self.engines().generate(
                self.model_of(label),
                label,
                task.prompts,
                Sampling(**self._sampling),
                out,
                self.recipe.generate.template,
                progress,
            )
            figures |= {key: result.report[key] for key in ("n", "truncated", "errors", "tokens")}

    def judge(self) -> None:
        """Verdicts on every model's answers."""
        for name, task in self.tasks.items():
            reference, file = self._reference(task)
            labels = [label for label in self.recipe.labels() if label != reference]
            config = self.judge_config(task)
            inputs = {
                "judge": self.tree["judge"] | {"protocol": config.protocol} | self.inputs_of_judge(config),
                "reference": reference or source_identity(file or task.source),
                "answers": {label: self.inputs_of[f"generate/{label}/{name}"] for label in self.recipe.labels()},
            }
            if labels and (config.url or config.reward_model) and self.needs(f"judge/{name}", inputs):
                self._judge(task, labels)

    def _judge(self, task: Task, labels: list[str]) -> None:
        import pandas as pd

        from eval.judge.reward_scores import judge_by_scores
        from eval.judge.verdicts import judge, ledger, write_verdicts

        folder = self.folder / "judge" / task.name
        reference = self._reference_rows(task)
        frames: list[pd.DataFrame] = []
        with (
            self.doing(f"judge/{task.name}", [folder / "verdicts.parquet"]) as figures,
            self.serving(self.judge_config(task)) as config,
        ):
            store = self.folder / "judge" / "store.sqlite"
            store.parent.mkdir(exist_ok=True)
            subset = self.recipe.generate.limit is not None
            rewards = self._rewards(config, task)
            for label, against, rows in self._matches(task, labels, reference):
                outputs = self.outputs(label, task.name)
                if rewards:
                    frames.append(judge_by_scores(outputs, rows, rewards, task.name, subset=subset))
                    continue
                frame = judge(
                    outputs,
                    rows,
                    config,
                    store,
                    task.name,
                    self._counting(f"judge {label} against {against}, {task.name}"),
                    subset=subset,
                    spent_usd=self.spent_usd,
                )
                self.spent_usd += ledger(frame)["spent_usd"]
                frames.append(frame)
            verdicts = pd.concat(frames, ignore_index=True)
            write_verdicts(verdicts, folder / "verdicts.parquet")
            (folder / "reference.json").write_text(json.dumps(reference, ensure_ascii=False, indent=1))
            figures |= ledger(verdicts)
        if figures["failed"]:
            self.manifest.reopen(f"judge/{task.name}")
            counts = ", ".join(f"{count} {kind}" for kind, count in figures["errors"].items())
            self.notes.append(
                f"{task.name}: {figures['failed']} of {len(verdicts)} verdicts failed ({counts}). The board counts"
                " them, and the same command asks for them again."
            )

    def _rewards(self, config: JudgeConfig, task: Task) -> RewardJudge | None:
        if config.reward_model is None:
            return None
        from pipeline.judge.reward_model import RewardJudge

        def progress(done: int, total: int) -> None:
            self.show(f"score answers, {task.name}", done, total, "")

        self.close_engines()  # scoring wants their memory
        return RewardJudge(config.reward_model, template=self.recipe.generate.template, progress=progress)

    def _matches(self, task: Task, labels: list[str], reference: Rows) -> Iterator[tuple[str, str, Rows]]:
        """Who is judged against whom: every model against the reference, and against each other if asked for."""
        name = self._reference(task)[0] or "the reference"
        yield from ((label, name, reference) for label in labels)
        if self.recipe.judge.each_other:
            trained = [label for label in labels if label in self.recipe.methods]
            for first, second in combinations(trained, 2):
                yield second, first, self.outputs(first, task.name)

    def measure(self) -> None:
        """What a world with known truth allows to measure."""
        if self.world is None or self.recipe.world is None:
            return
        inputs = {stage: value for stage, value in self.inputs_of.items() if stage.startswith(("generate/", "train/"))}
        if self.needs("truth", inputs):
            with self.doing("truth", [self.folder / "world.json"]):
                self.show("known truth", 0, 1, "")
                methods = {label: self.recipe.method(label) for label in self.recipe.labels()[1:]}
                self.world.measure(self.folder, self.world_folder, self.recipe.labels(), methods)
                self.show("known truth", 1, 1, "")

    def report(self) -> None:
        """Token weights for the page, the table, the page."""
        inputs = {"stages": dict(self.inputs_of), "report": self.tree["report"], "name": self.recipe.name}
        if not (self.needs("report", inputs) or self.did):
            return
        from eval.board.report import build

        with self.doing("report", [self.folder / "report.html"]):
            self.show("report", 0, 2, "token weights")
            write_weights(self)
            self.show("report", 1, 2, "page")
            write_board(self)
            build([self.folder], self.folder, self.recipe.report.title)
            self.show("report", 2, 2, "")

    # ---- parts of stages ----

    @property
    def _pairs(self) -> Path:
        return self.folder / "pairs" / "pairs.jsonl"

    @property
    def _engine(self) -> dict[str, Any]:
        return {key: self.tree["generate"][key] for key in ("backend", "dtype", "max_model_len", "template")}

    @property
    def _sampling(self) -> dict[str, Any]:
        return {key: self.tree["generate"][key] for key in ("temperature", "top_p", "max_tokens", "seed")}

    def _training(self, label: str) -> dict[str, Any]:
        train = self.recipe.train_of(label).model_dump(mode="json")
        kept = {key: value for key, value in train.items() if key not in EXECUTION_KEYS_OF_TRAINING}
        names = ("lora", "quantization") if self.recipe.model.lora else ()
        return kept | {name: self.tree["model"][name] for name in names}

    def _counting(self, what: str) -> Callable[[int, int, int], None]:
        def progress(done: int, total: int, failed: int) -> None:
            self.show(what, done, total, f"{failed} failed" if failed else "")

        return progress

    def _fit(self, labels: list[str], model: ModelConfig) -> dict[str, str]:
        """Train the labels in one worker group; gives the file of token ids that each was trained on."""
        supervised = labels == ["base"]
        tokens = self.tokens(supervised=supervised)
        from pipeline.cluster.connect import connect
        from pipeline.train.launcher import fit, make_job, padded_batches

        connect(self.recipe.cluster.address)
        caches = self.folder.parent / "scorers"
        jobs = [
            make_job(self.recipe, self.folder, label, model=model, tokens=tokens, caches=caches) for label in labels
        ]
        if not supervised:
            self.notes += padded_batches(model)
        group = self.recipe.train_of("base") if supervised else self.recipe.train
        fit(jobs, self.folder, name="base" if supervised else "methods", train=group, show=self.show)
        return {job.label: job.tokens for job in jobs}

    def _reference(self, task: Task) -> tuple[str | None, str | None]:
        """(label, None): a model of the run is the reference; (None, file); (None, None): the task's own answers."""
        reference = self.recipe.judge.reference
        if reference in self.recipe.labels():
            return reference, None
        if reference:
            return None, self.resolve(reference)
        return (None, None) if task.prompts and all(p.reference for p in task.prompts) else ("base", None)

    def _reference_rows(self, task: Task) -> Rows:
        from eval.outputs import load_outputs

        label, file = self._reference(task)
        if label:
            return self.outputs(label, task.name)
        if file:
            return load_outputs(file)
        names = ("instruction", "dataset")
        return [
            {name: getattr(p, name) for name in names} | {"output": p.reference, "generator": "reference"}
            for p in task.prompts
        ]

    def outputs(self, label: str, task: str) -> Rows:
        """A model's answers to a task."""
        return json.loads((self.folder / "models" / label / task / "model_outputs.json").read_text())
