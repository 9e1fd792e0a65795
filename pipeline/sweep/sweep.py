"""Ray Tune over `methods.*` and `train.*` keys: trials share the base, tokens, frozen-model caches and one engine.

otpo sweep small_world sweep.params.methods.otpo.reg='[0.03, 0.1, 0.3, 1]'

Everything lands in `runs/<name>/sweep/`, laid out as a run is, with a label for each trial, and beside that
`results.csv`, `plot.svg` and `best.yaml`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
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
from pipeline.sweep.judging import judging_trials, write_page
from pipeline.sweep.results import Outcome, read_outcome, with_held_out, write_results, write_summary
from pipeline.sweep.search import Search, check_glis, frozen_sources, labels_before_trials, plan
from pipeline.sweep.tuner import allocate, run_trials
from pipeline.tracking.mirror import settings_of, tracking

if TYPE_CHECKING:
    from pipeline.cluster.placement import Allocation

Say = Callable[[str], None]


def sweep(
    recipe: Recipe,
    folder: str | Path,
    *,
    world: World | None = None,
    progress: Progress = silent,
    say: Say = print,
    redo: bool = False,
) -> Outcome:
    """Do what of a sweep is not done yet.

    Args:
        folder: of the run; the sweep's own is `folder/sweep`.
        world: what the recipe's `world:` values stand for.
        progress: called as work proceeds. say: called with a line that a person should read.
        redo: accept a changed recipe under an old name.

    Raises:
        UserError: wrong input or too small a cluster; nothing was started. WorkError: no trial came to its end.
    """
    search = plan(recipe)
    if search.by_preference:
        check_glis()
    with writing_run(folder, progress):
        run = open_context(recipe, folder, world=world, progress=progress, redo=redo, evaluates=bool(search.task))
        if search.task:
            check_evaluation(run)
        with _tracking(run, search, say), run.engines:
            return _sweep(run, search, say)


@contextmanager
def _tracking(run: RunContext, search: Search, say: Say) -> Iterator[None]:
    """Trackers of the run and of each trial."""

    def settings(trial: str) -> dict[str, Any]:
        file = run.folder.sweep.label(trial).trial  # the winner trained again has none
        tried = json.loads(file.read_text())["params"] if file.exists() else {}
        return settings_of(run.recipe, search.label) | {"trial": tried}

    with (
        tracking(run.recipe, run.folder, note=say),
        tracking(run.recipe, run.folder.sweep, note=say, settings=settings),
    ):
        yield


def _sweep(run: RunContext, search: Search, say: Say) -> Outcome:
    recipe, manifest, folder = run.recipe, run.manifest, run.folder.sweep
    task = run.sources.tasks[search.task] if search.task else None
    prompts = split(task, recipe.sweep.held_out) if task else None
    if task and reference_of(run, task).label not in (None, "base"):
        raise UserError(
            f"judge.reference is '{recipe.judge.reference}', which a sweep does not train: set judge.reference=base, or"
            " a file."
        )
    # a first call is refused before the base is trained, and a finished one needs no Ray
    allocation = None
    if not manifest.finished("sweep"):
        allocation = allocate(recipe, search)
        check_room(run, generates=task is not None)
    enter_recipe(recipe, manifest)
    base(run)
    pairs(run)
    train(run, labels_before_trials(recipe, search))
    trained_from, objective = trial_inputs(run, search), objective_inputs(run, search, prompts)
    tried = recipe.sweep.model_dump(mode="json", exclude={"max_concurrent_trials"})
    inputs = {"trials": trained_from, "objective": objective, "sweep": tried}
    if not manifest.needs("sweep", inputs):
        return read_outcome(folder, search)
    manifest.begin("sweep/trials", trained_from, [folder.path])
    started = time.perf_counter()
    outcome, finished = _trials(run, search, prompts, allocation or allocate(recipe, search), digest(objective), say)
    # trials that were judged against each other have no board in common
    write_page(
        run,
        prompts,
        [] if search.by_preference else finished,
        [] if outcome.held_out is None else outcome.held_out["trial"].tolist(),
    )
    if not outcome.failed:  # the same command tries failed trials again
        with manifest.doing("sweep", inputs, [folder.results, folder.best]) as figures:
            figures["trials_seconds"] = round(time.perf_counter() - started, 2)
    return outcome


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
    run: RunContext, search: Search, prompts: Prompts | None, allocation: Allocation, key: str, say: Say
) -> tuple[Outcome, list[str]]:
    """Run the trials and judge the winner again; gives the outcome, and the trials that came to their end.

    Raises:
        WorkError: none did.
    """
    folder = run.folder.sweep
    tokens = run.sources.tokens()
    if prompts is None and tokens.validation is None:
        raise UserError(f"sweep.metric {search.metric} needs validation pairs: raise data.validation.")
    from pipeline.cluster.connect import connect
    from pipeline.sweep.queue import JudgingQueue
    from pipeline.sweep.trials import TrialSettings

    connect(run.recipe.cluster.address)
    workers, cpus = run.recipe.train_of(search.label).fewest_workers, allocation.cpus
    say(
        f"{search.n_trials} trials, {allocation.concurrent} at a time: each has {workers} training"
        f" worker{'s' * (workers > 1)} with {cpus} CPU{'s' * (cpus > 1)}."
    )
    settings = TrialSettings(
        recipe=run.recipe,
        search=search,
        run=run.folder,
        start=run.sources.start,
        tokens=tokens,
        cpus=cpus,
        sources={source: run.sources.resolve(source) for source in frozen_sources(run.recipe, search.label)},
        key=key,
    )
    queue: Any = JudgingQueue.remote()  # type: ignore[attr-defined]
    with judging_trials(
        run, prompts, queue, keep_engine=allocation.keep_engine, by_preference=search.by_preference
    ) as judging:
        trials = run_trials(settings, queue, allocation.concurrent, run.progress)
        outcome = write_results(run.recipe, search, folder, trials)
        if outcome.best is None:
            raise WorkError(
                f"Not one of {len(trials)} trials came to its end; {folder.results} has the reasons. The first:"
                f" {trials[0].get('error')}"
            )
        if judging is not None and judging.prompts.fresh is not None:
            winner = next(trial for trial in trials if trial["name"] == outcome.best)
            outcome = with_held_out(outcome, judge_winner(settings, winner, judging.winner, run.progress))
    write_summary(search, run.recipe, outcome)
    return outcome, [trial["name"] for trial in trials if trial["state"] == "done"]
