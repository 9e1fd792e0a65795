"""One trial of a sweep: a Ray Train run of the same worker, inside a Ray Tune function.

A trial is one more label in the sweep's folder: `models/<trial>/` holds what any trained label's folder holds, and
`trial.json` beside it says what was tried and what came of it. Answers and verdicts are the driver's work: a judged
trial asks for them through a `Desk` and waits, so that one engine, one judge client and one writer serve every trial.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune

from otpo.errors import UserError, WorkError
from pipeline.progress import Progress
from pipeline.recipe import ModelConfig, Recipe
from pipeline.run.metrics import newest_step
from pipeline.sweep.search import Params, Search, rounded, trial_name, trial_recipe
from pipeline.train.launcher import fit, make_job
from pipeline.train.tokens import Tokens
from pipeline.train.worker import TrainJob

DONE, FAILED, STOPPED, RUNNING = "done", "failed", "stopped", "running"
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Setting:
    """What all trials of a sweep share; it travels to every trial.

    Attributes:
        folder: of the sweep.
        models: folder of the parent run's models.
        caches: of frozen models' log-probabilities, shared by all runs.
        start: where every trial starts, and its reference.
        cpus: of each training worker.
        key: hash of what the objective depends on beside the trained model.
    """

    recipe: Recipe
    search: Search
    folder: Path
    models: Path
    caches: Path
    start: ModelConfig
    tokens: Tokens
    cpus: int
    key: str

    def job(self, params: Params, name: str) -> tuple[Recipe, TrainJob]:
        """The training job of a trial."""
        recipe = trial_recipe(self.recipe, self.search.label, params, name, self.models)
        job = make_job(recipe, self.folder, name, model=self.start, tokens=self.tokens, caches=self.caches)
        return recipe, job


@ray.remote(num_cpus=0)
class Desk:
    """Where trials leave their questions for the driver and wait for the answers."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[str] = asyncio.Queue()
        self.waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self.claims: dict[str, int] = {}

    async def claim(self, name: str) -> int:
        """How often the name was claimed before: a sampler may draw the same values twice at the same time."""
        self.claims[name] = self.claims.get(name, -1) + 1
        return self.claims[name]

    async def ask(self, name: str) -> dict[str, Any]:
        """The driver's figures for a trained trial; {"error": text} if it could not get them."""
        self.waiting[name] = asyncio.get_running_loop().create_future()
        await self.asked.put(name)
        return await self.waiting[name]

    async def next(self) -> str:
        """The next trial that asks."""
        return await self.asked.get()

    async def answer(self, name: str, figures: dict[str, Any]) -> None:
        """Answer `ask`."""
        self.waiting.pop(name).set_result(figures)


def run_trial(values: dict[str, Any], *, setting: Setting, desk: Any) -> None:
    """Ray Tune's function: train, get the metric, report it.

    Args:
        values: {"params": ...} of a grid, or the sampled values themselves.

    A failure is written to the trial's folder and not raised: it is a row of the table, not the end of the sweep.
    """
    params = {key: rounded(value) for key, value in values.get("params", values).items()}
    name = trial_name(params)
    earlier = read_trial(setting.folder, name)
    if earlier.get("state") == DONE and earlier["key"] == setting.key:
        write_trial(setting.folder, name, earlier | {"tune": tune.get_context().get_trial_id()})
        _report(setting, name, earlier["figures"])
        return
    if claimed := ray.get(desk.claim.remote(name)):
        name = f"{name}.{claimed + 1}"
    recipe, job = setting.job(params, name)
    record = {
        "name": name,
        "params": params,
        "key": setting.key,
        "tune": tune.get_context().get_trial_id(),
        "started": time.time(),
        "total_steps": job.total_steps,
    }
    write_trial(setting.folder, name, record | {"state": RUNNING})
    try:
        figures = _train(setting, recipe, job)
        if setting.search.task is not None:
            answer = ray.get(desk.ask.remote(name))
            if "error" in answer:
                raise WorkError(answer["error"])
            figures |= answer
        if figures.get(setting.search.metric) is None:
            raise WorkError(f"No {setting.search.metric}; the trial gave: {', '.join(sorted(figures))}.")
        end: dict[str, Any] = {"state": DONE, "figures": figures}
    except ray.exceptions.RayTaskError as error:
        end = {"state": FAILED, "error": str(error.cause) if error.cause else str(error).strip().splitlines()[-1]}
    except (UserError, WorkError) as error:
        end = {"state": FAILED, "error": str(error)}
    except Exception as error:
        end = {"state": FAILED, "error": f"{type(error).__name__}: {error}"}
    write_trial(setting.folder, name, record | end | {"seconds": time.time() - record["started"]})
    if end["state"] == DONE and setting.search.task is not None:
        _report(setting, name, end["figures"])


def _train(setting: Setting, recipe: Recipe, job: TrainJob) -> dict[str, Any]:
    """Train and report evaluations as they come; gives the last training line and the exported model's evaluation."""
    evaluations = _Evaluations(job.folder / "metrics.jsonl")
    reporting: Callable[[], None] = (
        (lambda: None) if setting.search.task is not None else (lambda: _report_new(setting, evaluations))
    )
    if not (job.folder / "model").exists():
        # A task of its own, whose environment Ray Train's helpers inherit: where several Ray clusters share a machine,
        # its placement-group cleaner finds this one by RAY_ADDRESS only, and without it a stopped trial keeps its CPUs.
        address = ray.get_runtime_context().gcs_address
        remote = ray.remote(num_cpus=0, max_retries=0, runtime_env={"env_vars": {"RAY_ADDRESS": address}})(_fit)
        training = remote.remote(setting, recipe, job)
        while not ray.wait([training], timeout=POLL_SECONDS)[0]:
            reporting()  # ends this function, and with its process the task, when ASHA stops the trial
        ray.get(training)
    reporting()
    lines = evaluations.lines()
    train_lines = [line for line in lines if "loss" in line]
    figures = dict(train_lines[-1]) if train_lines else {}
    if found := [line for line in lines if _is_evaluation(line)]:
        best, mode = recipe.train.best_metric, {"min": min, "max": max}[recipe.train.best_mode]
        figures |= mode(found, key=lambda line: line[best]) if best else found[-1]
    return figures


def _fit(setting: Setting, recipe: Recipe, job: TrainJob) -> None:
    fit(
        [job],
        setting.folder,
        name=job.label,
        train=recipe.train_of(job.label),
        show=lambda *_: None,
        cpus=setting.cpus,
    )


class _Evaluations:
    """The evaluation lines of a growing `metrics.jsonl`."""

    def __init__(self, path: Path):
        self.path, self.seen = path, 0

    def lines(self) -> list[dict[str, Any]]:
        """Every complete line."""
        text = self.path.read_text() if self.path.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1] if line.endswith("}")]

    def new(self) -> list[dict[str, Any]]:
        """Evaluations that were not given before, by step: a restarted worker writes some again."""
        found = [line for line in self.lines() if _is_evaluation(line) and line["step"] > self.seen]
        self.seen = found[-1]["step"] if found else self.seen
        return found


def _is_evaluation(line: dict[str, Any]) -> bool:
    return any(key.startswith("eval_") for key in line)


def _report_new(setting: Setting, evaluations: _Evaluations) -> None:
    for line in evaluations.new():
        if setting.search.metric not in line:
            raise WorkError(f"No {setting.search.metric}; an evaluation gives: {', '.join(sorted(line))}.")
        tune.report({"step": line["step"], setting.search.metric: line[setting.search.metric]})


def _report(setting: Setting, name: str, figures: dict[str, Any]) -> None:
    if setting.search.task is None:
        _report_new(setting, _Evaluations(setting.folder / "models" / name / "metrics.jsonl"))
    else:
        tune.report({"step": figures.get("step", 0), setting.search.metric: figures[setting.search.metric]})


def trial_file(folder: Path, name: str) -> Path:
    """Where a trial's record is."""
    return folder / "models" / name / "trial.json"


def read_trial(folder: Path, name: str) -> dict[str, Any]:
    """A trial's record: name, params, state, then figures or error; empty before its first start."""
    path = trial_file(folder, name)
    return json.loads(path.read_text()) if path.exists() else {}


def write_trial(folder: Path, name: str, record: dict[str, Any]) -> None:
    """Write a trial's record, whole or not at all."""
    from pipeline.generate.outputs import write_json

    trial_file(folder, name).parent.mkdir(parents=True, exist_ok=True)
    write_json(trial_file(folder, name), record)


def trial_records(setting: Setting) -> list[dict[str, Any]]:
    """The records of this sweep's trials, of earlier calls too."""
    names = [path.parent.name for path in sorted(setting.folder.glob("models/*/trial.json"))]
    records = [read_trial(setting.folder, name) for name in names]
    keys = set(setting.recipe.sweep.params)
    return [record for record in records if record["key"] == setting.key and set(record["params"]) == keys]


class SweepCallback(tune.Callback):
    """Shows where the running trials are, and settles what became of those that could not say so themselves."""

    def __init__(self, setting: Setting, show: Progress):
        self.setting, self.show = setting, show
        self.shown, self.ended, self.died = 0.0, 0, set[str]()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles callbacks for a restore that a sweep has no use for, and a terminal cannot travel."""
        return {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Called by Tune several times a second."""
        if time.monotonic() - self.shown < 1:
            return
        self.shown = time.monotonic()
        for record in trial_records(self.setting):
            line = newest_step(self.setting.folder / "models" / record["name"] / "metrics.jsonl")
            if record["state"] == RUNNING and line:
                self.show(f"train {record['name']}", line["step"], record["total_steps"], f"loss {line['loss']:.4f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Count it."""
        self.ended += 1
        self.show("trials", self.ended, self.setting.search.n_trials, "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Remember it: only a trial whose process died comes here."""
        self.died.add(trial.trial_id)
        self.on_trial_complete(iteration, trials, trial)

    def settle(self) -> None:
        """Give an end to the records of trials that ASHA stopped or whose process died."""
        for record in trial_records(self.setting):
            if record["state"] != RUNNING:
                continue
            evaluations = _Evaluations(self.setting.folder / "models" / record["name"] / "metrics.jsonl").new()
            end = {"state": STOPPED, "figures": evaluations[-1] if evaluations else {}}
            if record["tune"] in self.died:
                end = {
                    "state": FAILED,
                    "error": "the trial's process died; `ray logs` or dmesg may say why (out of memory?)",
                }
            write_trial(
                self.setting.folder, record["name"], record | end | {"seconds": time.time() - record["started"]}
            )
