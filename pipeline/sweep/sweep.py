"""Ray Tune over `methods.*` and `train.*` keys: trials share the base, tokens, frozen-model caches and one engine.

otpo sweep small_world sweep.params.methods.otpo.reg='[0.03, 0.1, 0.3, 1]'

Everything lands in `runs/<name>/sweep/`, laid out as a run is, with a label for each trial, and beside that
`results.csv`, `plot.svg` and `best.yaml`. Where `sweep.label` is a list, the labels are searched one after the other.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otpo.errors import UserError, WorkError
from pipeline.progress import Progress, silent
from pipeline.recipe import Recipe, digest
from pipeline.run.checks import check_evaluation
from pipeline.run.context import RunContext
from pipeline.run.inputs import reading_inputs, training_inputs
from pipeline.run.judges import reference_of
from pipeline.run.manifest import enter_recipe
from pipeline.run.room import check_room
from pipeline.run.run import open_context, writing_run
from pipeline.run.stages.base import base
from pipeline.run.stages.generate import generation_inputs
from pipeline.run.stages.judge import judging_inputs
from pipeline.run.stages.pairs import pairs
from pipeline.run.stages.train import pairs_inputs, train
from pipeline.run.world import World
from pipeline.sweep.held_out import Prompts, judge_winner, split
from pipeline.sweep.judging import TrialJudging, judging_trials, write_page
from pipeline.sweep.results import (
    Outcome,
    read_outcomes,
    with_held_out,
    write_held_out,
    write_results,
    write_summary,
)
from pipeline.sweep.search import Search, check_glis, plan
from pipeline.sweep.trial_recipes import frozen_sources, labels_before_trials
from pipeline.sweep.tuner import allocate_trials, run_trials
from pipeline.tracking.mirror import settings_of, tracking

if TYPE_CHECKING:
    from pipeline.cluster.placement import Allocation
    from pipeline.sweep.trials import TrialSettings

Say = Callable[[str], None]


def sweep(
    recipe: Recipe,
    folder: str | Path,
    *,
    world: World | None = None,
    progress: Progress = silent,
    say: Say = print,
    redo: bool = False,
) -> list[Outcome]:
    """Do what of a sweep is not done yet; gives the outcome of each label.

    Args:
        folder: of the run; the sweep's own is `folder/sweep`.
        world: what the recipe's `world:` values stand for.
        progress: called as work proceeds. say: called with a line that a person should read.
        redo: accept a changed recipe under an old name.

    Raises:
        UserError: wrong input or too small a cluster; nothing was started. WorkError: no trial came to its end.
    """
    searches = plan(recipe)
    if searches[0].by_preference:
        check_glis()
    judged = bool(searches[0].task)
    with writing_run(folder, progress):
        run = open_context(recipe, folder, world=world, progress=progress, redo=redo, evaluates=judged)
        if judged:
            check_evaluation(run)
        with _tracking(run, searches, say), run.engines:
            return _sweep(run, searches, say)


@contextmanager
def _tracking(run: RunContext, searches: Sequence[Search], say: Say) -> Iterator[None]:
    """Trackers of the run and of each trial."""

    def settings(trial: str) -> dict[str, Any]:
        file = run.folder.sweep.label(trial).trial  # the winner trained again has none
        record = json.loads(file.read_text()) if file.exists() else {}
        label = record.get("label") or _label_of(trial, searches)
        return settings_of(run.recipe, label) | {"trial": record.get("params", {})}

    with (
        tracking(run.recipe, run.folder, note=say),
        tracking(run.recipe, run.folder.sweep, note=say, settings=settings),
    ):
        yield


def _label_of(trial: str, searches: Sequence[Search]) -> str:
    """The label that a trial's name begins with; of labels that begin alike the longest."""
    found = [search.label for search in searches if trial.startswith(f"{search.label}.")]
    return max(found, key=len, default=searches[0].label)


def _sweep(run: RunContext, searches: Sequence[Search], say: Say) -> list[Outcome]:
    recipe, manifest, folder = run.recipe, run.manifest, run.folder.sweep
    name = searches[0].task
    task = run.sources.tasks[name] if name else None
    prompts = split(task, recipe.sweep.held_out) if task else None
    if task and reference_of(run, task).label not in (None, "base"):
        raise UserError(
            f"judge.reference is '{recipe.judge.reference}', which a sweep does not train: set judge.reference=base, or"
            " a file."
        )
    # a first call is refused before the base is trained, and a finished one needs no Ray
    allocation = None
    if not manifest.finished("sweep"):
        allocation = allocate_trials(recipe, searches[0])
        check_room(run, generates=task is not None)
        _check_engine_beside(allocation, searches[0])
    enter_recipe(recipe, manifest)
    base(run)
    pairs(run)
    train(run, labels_before_trials(recipe, [search.label for search in searches], judged=task is not None))
    trained_from, objective = _trials_inputs(run, searches), objective_inputs(run, searches[0], prompts)
    unset = {"judge_every"} if recipe.sweep.judge_every is None else set()  # sweeps from before it stay finished
    tried = recipe.sweep.model_dump(mode="json", exclude={"max_concurrent_trials", *unset})
    inputs = {"trials": trained_from, "objective": objective, "sweep": tried}
    if not manifest.needs("sweep", inputs):
        return read_outcomes(folder, searches)
    _remove_stale(run, searches, trained_from)
    started = time.perf_counter()
    allocation = allocation or allocate_trials(recipe, searches[0])
    outcomes, finished = _trials(run, searches, prompts, allocation, digest(objective), say)
    fresh = [outcome.held_out for outcome in outcomes if outcome.held_out is not None]
    # trials that were judged against each other have no board in common
    write_page(
        run,
        prompts,
        [] if searches[0].by_preference else finished,
        [trial for table in fresh for trial in table["trial"]],
    )
    if not any(outcome.failed for outcome in outcomes):  # the same command tries failed trials again
        with manifest.doing("sweep", inputs, [folder.results, folder.best]) as figures:
            figures["trials_seconds"] = round(time.perf_counter() - started, 2)
    return outcomes


def _check_engine_beside(allocation: Allocation, search: Search) -> None:
    """Refuse milestones that could only be judged when the training that they are of is over."""
    if search.judge_every and not allocation.keep_engine:
        raise UserError(
            "sweep.judge_every (or scheduler asha with a judge's metric) judges models while trials train, and there is"
            " no GPU for an engine beside a trial: take fewer train.workers, add a GPU, or leave it out."
        )


def _trials_inputs(run: RunContext, searches: Sequence[Search]) -> dict[str, Any]:
    """What the trials' models depend on beside their own values: of a list of labels, for each."""
    if not searches[0].of_several:
        return trial_inputs(run, searches[0])
    return {search.label: trial_inputs(run, search) for search in searches}


def _remove_stale(run: RunContext, searches: Sequence[Search], trained_from: dict[str, Any]) -> None:
    """Remove trials that were trained from other inputs; of a list of labels, only those of the labels that changed."""
    manifest, folder = run.manifest, run.folder.sweep
    if not searches[0].of_several:
        manifest.begin("sweep/trials", trained_from, [folder.path])
        return
    from pipeline.sweep.trials import read_trial

    manifest.begin("sweep/trials", "several labels", [folder.path])
    trials = {trial.path: read_trial(trial).get("label") for trial in folder.trials()}
    for search in searches:
        own = [path for path, label in trials.items() if label == search.label]
        manifest.begin(f"sweep/trials/{search.label}", trained_from[search.label], own)


def trial_inputs(run: RunContext, search: Search) -> dict[str, Any]:
    """What a trial's model depends on beside the trial's own values."""
    spec = run.recipe.method(search.label)
    return {
        "base": run.manifest.inputs["base"],
        "rows": pairs_inputs(run),
        "train": training_inputs(run.recipe, search.label),
        "data": reading_inputs(run.recipe),
        "method": [search.label, spec.method.name, {**spec.hyperparameters, **spec.frozen_models}],
    }


def objective_inputs(run: RunContext, search: Search, prompts: Prompts | None) -> dict[str, Any] | None:
    """What a trial's figures depend on beside its model."""
    if prompts is None:
        return None
    compared = {"compared": "with trials"} if search.by_preference else {}
    return generation_inputs(run, prompts.trials) | judging_inputs(run, prompts.whole) | compared


def _trials(
    run: RunContext, searches: Sequence[Search], prompts: Prompts | None, allocation: Allocation, key: str, say: Say
) -> tuple[list[Outcome], list[str]]:
    """Run the trials of one label after the other, then judge the winners again.

    Returns:
        The outcome of each label, and all trials that came to their end.

    Raises:
        WorkError: no trial came to its end.
    """
    folder = run.folder.sweep
    tokens = run.sources.tokens()
    if prompts is None and tokens.validation is None:
        raise UserError(f"sweep.metric {searches[0].metric} needs validation pairs: raise data.validation.")
    from pipeline.cluster.connect import connect
    from pipeline.sweep.queue import judging_queue

    connect(run.recipe.cluster.address)
    say(_what_runs(run, searches, allocation))
    settings = [_settings(run, search, allocation.cpus, key) for search in searches]
    keep, by_preference = allocation.keep_engine, searches[0].by_preference
    with (
        judging_queue() as queue,
        judging_trials(run, prompts, queue, keep_engine=keep, by_preference=by_preference) as judging,
    ):
        trials = [run_trials(each, queue, allocation.concurrent, run.progress) for each in settings]
        outcomes = write_results(run.recipe, searches, folder, trials)
        if all(outcome.best is None for outcome in outcomes):
            raise WorkError(
                f"Not one of {sum(map(len, trials))} trials came to its end; {folder.results} has the reasons. The"
                f" first: {trials[0][0].get('error')}"
            )
        if judging is not None and judging.prompts.fresh is not None:
            outcomes = [
                _with_winner_judged(each, outcome, records, judging, run.progress)
                for each, outcome, records in zip(settings, outcomes, trials, strict=True)
            ]
            write_held_out(outcomes)
    write_summary(outcomes)
    return outcomes, [trial["name"] for records in trials for trial in records if trial["state"] == "done"]


def _settings(run: RunContext, search: Search, cpus: int, key: str) -> TrialSettings:
    from pipeline.sweep.trials import TrialSettings

    return TrialSettings(
        recipe=run.recipe,
        search=search,
        run=run.folder,
        start=run.sources.start,
        tokens=run.sources.tokens(),
        cpus=cpus,
        sources={source: run.sources.resolve(source) for source in frozen_sources(run.recipe, search.label)},
        key=key,
    )


def _what_runs(run: RunContext, searches: Sequence[Search], allocation: Allocation) -> str:
    search, cpus = searches[0], allocation.cpus
    workers = run.recipe.train_of(search.label).fewest_workers
    trials = f"{search.n_trials} trials"
    if search.of_several:
        trials += f" of each of {', '.join(search.label for search in searches)}"
    return (
        f"{trials}, {allocation.concurrent} at a time: each has {workers} training"
        f" worker{'s' * (workers > 1)} with {cpus} CPU{'s' * (cpus > 1)}."
    )


def _with_winner_judged(
    settings: TrialSettings,
    outcome: Outcome,
    trials: list[dict[str, Any]],
    judging: TrialJudging,
    progress: Progress,
) -> Outcome:
    """The outcome with its winner's figures on fresh prompts; as it is where no trial came to its end."""
    winner = next((trial for trial in trials if trial["name"] == outcome.best), None)
    if winner is None:
        return outcome
    return with_held_out(outcome, judge_winner(settings, winner, judging.winner, progress))
