"""One trial of a sweep: a Ray Train run of the same worker, inside a Ray Tune function.

A trial is one more label in the sweep's folder: `models/<trial>/` holds what any trained label's folder holds, and
`trial.json` in it says what was tried and what came of it. The driver generates and judges: a trained trial waits in
the `JudgingQueue` for its figures.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune

from otpo.errors import LastingError, UserError, WorkError
from otpo.files import write_json
from pipeline.milestones.judged import TrialMilestones, forget_milestones, judged_milestones
from pipeline.progress import silent
from pipeline.recipe import ModelConfig, Recipe
from pipeline.run.folder import LabelFolder, RunFolder, SweepFolder
from pipeline.sweep.search import Search
from pipeline.sweep.space import Params, rounded
from pipeline.sweep.trial_recipes import trial_recipe, trial_training
from pipeline.train.job import TrainJob
from pipeline.train.launcher import fit, make_job
from pipeline.train.tokens import Tokens

DONE, FAILED, STOPPED, RUNNING = "done", "failed", "stopped", "running"
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class TrialSettings:
    """What all trials of a label share. Ray sends it to every trial.

    Attributes:
        run: the folder of the run that is swept.
        start: where every trial starts, and its reference.
        cpus: of each training worker.
        sources: of frozen models that trials read -> absolute path or hub name.
        key: hash of what the objective depends on beside the trained model.
    """

    recipe: Recipe
    search: Search
    run: RunFolder
    start: ModelConfig
    tokens: Tokens
    cpus: int
    sources: dict[str, str]
    key: str

    @property
    def folder(self) -> SweepFolder:
        """Where the trials are."""
        return self.run.sweep

    def keeps(self, record: dict[str, Any]) -> bool:
        """Whether a record is of a trial that is finished: that came to its end, or that ASHA has stopped."""
        finished = {DONE, STOPPED} if self.recipe.sweep.scheduler == "asha" else {DONE}
        return bool(record) and record["key"] == self.key and record["state"] in finished

    def job(self, params: Params, name: str, *, seed: int | None = None) -> tuple[Recipe, TrainJob]:
        """The recipe and the training job of a trial, by another seed than its own where one is given."""
        recipe = trial_recipe(self.recipe, self.search.label, params, name, self.run, seed=seed)
        caches = self.run.frozen_caches
        job = make_job(
            recipe,
            self.folder.path,
            name,
            model=self.start,
            tokens=self.tokens,
            caches=caches,
            resolve=lambda source: self.sources.get(source, source),
        )
        return recipe, replace(job, milestones=self.search.judge_every)


def run_trial(values: dict[str, Any], *, settings: TrialSettings, queue: Any) -> None:
    """Ray Tune's function: train, get the metric, report it.

    Args:
        values: {"params": ...} of a grid, the sampled values themselves, or what a `PreferenceSearch` suggests.

    What an earlier call finished is told to Tune again; what it began goes on from its checkpoint. A failure is written
    to the trial's folder and not raised: it is a row of the table, not the end of the sweep.
    """
    params = {key: rounded(value) for key, value in values.get("params", values).items()}
    name, this = values.get("name") or settings.search.trial_name(params), tune.get_context().get_trial_id()
    earlier = read_trial(settings.folder.label(name))
    if settings.keeps(earlier):
        write_trial(settings.folder.label(name), earlier | {"tune": this})
        _report_again(settings, earlier)
        return
    if claimed := ray.get(queue.claim.remote(name, this)):
        name = f"{name}.{claimed + 1}"
    folder = settings.folder.label(name)
    recipe, job = settings.job(params, name)
    before = read_trial(folder)
    if before.get("key", settings.key) != settings.key:
        forget_milestones(folder)
    record = {
        "name": name,
        **settings.search.named,
        "params": params,
        "key": settings.key,
        "tune": this,
        "before": seconds_of(before, folder),
        "total_steps": job.total_steps,
        "against": values.get("against"),
    }
    attempts = 1 + settings.recipe.sweep.max_failures
    died = before.get("attempts", 0) if before.get("tune") == this else 0  # Tune starts it again if its process dies
    for attempt in range(min(died + 1, attempts), attempts + 1):
        record |= {"started": time.time(), "attempts": attempt}
        write_trial(folder, record | {"state": RUNNING})
        end, lasting = _attempt(settings, queue, recipe, job, record["against"])
        seconds = record["before"] + time.time() - record["started"]
        write_trial(folder, record | end | {"seconds": seconds})
        if end["state"] == DONE and settings.search.task is not None:
            _report(settings, end["figures"])
        if end["state"] == DONE or lasting:
            return
        record["before"] = seconds


def _attempt(
    settings: TrialSettings, queue: Any, recipe: Recipe, job: TrainJob, against: str | None
) -> tuple[dict[str, Any], bool]:
    """Train and judge a trial once; gives the end of its record, and whether another attempt would end alike."""
    try:
        figures = _train(settings, queue, recipe, job)
        if settings.search.task is not None:
            judged = ray.get(queue.judged.remote(job.label, against))
            if "error" in judged:
                raise (LastingError if judged["lasting"] else WorkError)(judged["error"])
            figures |= judged
        _check_figures(settings, figures, "the trial gave")
    except ray.exceptions.RayTaskError as error:
        text = str(error.cause) if error.cause else str(error).strip().splitlines()[-1]
        return {"state": FAILED, "error": text}, isinstance(error.cause, (UserError, LastingError))
    except (UserError, WorkError) as error:
        return {"state": FAILED, "error": str(error)}, isinstance(error, (UserError, LastingError))
    except Exception as error:
        return {"state": FAILED, "error": f"{type(error).__name__}: {error}"}, False
    return {"state": DONE, "figures": figures}, False


def _train(settings: TrialSettings, queue: Any, recipe: Recipe, job: TrainJob) -> dict[str, Any]:
    """Train, and report evaluations or judged milestones as they come.

    Returns:
        The last training line and the exported model's evaluation.
    """
    folder = settings.folder.label(job.label)
    evaluations = Evaluations(folder.metrics)
    milestones = TrialMilestones(folder, job.label, queue, partial(_report, settings))
    reporting: Callable[[], None] = (
        milestones.advance if settings.search.task is not None else (lambda: _report_new(settings, evaluations))
    )
    if not folder.model.exists():
        # In a task of its own, whose environment Ray Train's helpers inherit. Train's placement-group cleaner finds the
        # cluster by RAY_ADDRESS where several share a machine; without the cleaner a stopped trial keeps its CPUs.
        address = ray.get_runtime_context().gcs_address
        remote = ray.remote(num_cpus=0, max_retries=0, runtime_env={"env_vars": {"RAY_ADDRESS": address}})(_fit)
        training = remote.remote(settings, recipe, job)
        while not ray.wait([training], timeout=POLL_SECONDS)[0]:
            reporting()  # ends this function, and with its process the task, when ASHA stops the trial
        ray.get(training)
    reporting()
    milestones.advance(wait=True)
    lines = evaluations.lines()
    train_lines = [line for line in lines if "loss" in line]
    figures = dict(train_lines[-1]) if train_lines else {}
    if found := [line for line in lines if _is_evaluation(line)]:
        best, mode = recipe.train.best_metric, {"min": min, "max": max}[recipe.train.best_mode]
        figures |= mode(found, key=lambda line: line[best]) if best else found[-1]
    return figures


def _fit(settings: TrialSettings, recipe: Recipe, job: TrainJob) -> None:
    fit(
        [job],
        settings.folder.path,
        name=job.label,
        train=trial_training(recipe, job.label),
        cluster=recipe.cluster,
        progress=silent,
        cpus=settings.cpus,
    )


class Evaluations:
    """The evaluation lines of a growing `metrics.jsonl`."""

    def __init__(self, path: Path):
        self.path, self.seen = path, 0

    def lines(self) -> list[dict[str, Any]]:
        """Every complete line."""
        text = self.path.read_text() if self.path.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1] if line.endswith("}")]

    def new(self) -> list[dict[str, Any]]:
        """The evaluations of later steps than those given before: a restarted worker writes some lines again."""
        found = [line for line in self.lines() if _is_evaluation(line) and line["step"] > self.seen]
        self.seen = found[-1]["step"] if found else self.seen
        return found


def _is_evaluation(line: dict[str, Any]) -> bool:
    return any(key.startswith("eval_") for key in line)


def _report_new(settings: TrialSettings, evaluations: Evaluations) -> None:
    for line in evaluations.new():
        _check_figures(settings, line, "an evaluation gives")
        _report(settings, line)


def _check_figures(settings: TrialSettings, figures: dict[str, Any], who: str) -> None:
    missing = [name for name in settings.search.objectives if figures.get(name) is None]
    if missing:
        raise LastingError(f"No {missing[0]}; {who}: {', '.join(sorted(figures))}.")


def _report_again(settings: TrialSettings, earlier: dict[str, Any]) -> None:
    """Report what a finished trial reported. One that was stopped may have been trained and judged a little further."""
    folder, figures = settings.folder.label(earlier["name"]), earlier["figures"]
    for found in on_the_way(settings, folder):
        if earlier["state"] == DONE or found["step"] <= figures.get("step", 0):
            _report(settings, found)
    if settings.search.task is not None:
        _report(settings, figures)


def on_the_way(settings: TrialSettings, folder: LabelFolder) -> list[dict[str, Any]]:
    """What a trial's folder holds of its training: figures of judged milestones, or evaluations, each with its step."""
    return judged_milestones(folder) if settings.search.task is not None else Evaluations(folder.metrics).new()


def _report(settings: TrialSettings, figures: dict[str, Any]) -> None:
    names = ("step", *settings.search.objectives)
    tune.report({"step": 0} | {name: figures[name] for name in names if name in figures})


def read_trial(folder: LabelFolder) -> dict[str, Any]:
    """A trial's record: name, params, state, then figures or error; empty before its first start."""
    return json.loads(folder.trial.read_text()) if folder.trial.exists() else {}


def seconds_of(record: dict[str, Any], folder: LabelFolder) -> float:
    """What a trial has taken, over all attempts; the last one of a process that died counts until its last step."""
    if not record or "seconds" in record:
        return record.get("seconds", 0.0)
    ended = folder.metrics.stat().st_mtime if folder.metrics.exists() else 0.0
    return record.get("before", 0.0) + max(0.0, ended - record["started"])


def write_trial(folder: LabelFolder, record: dict[str, Any]) -> None:
    """Write a trial's record, whole or not at all."""
    write_json(folder.trial, record)


def trial_records(settings: TrialSettings) -> list[dict[str, Any]]:
    """The records of this label's trials, of earlier calls too."""
    records = [read_trial(folder) for folder in settings.folder.trials()]
    keys, label = set(settings.search.space), settings.search.named.get("label")
    return [
        record
        for record in records
        if record["key"] == settings.key and record.get("label") == label and set(record["params"]) == keys
    ]
