"""Ray Tune over one label's trials: how many at once, who proposes their values, who stops them early."""

from __future__ import annotations

import logging
import os
import shutil
from typing import TYPE_CHECKING, Any

from pipeline.milestones.room import allocate
from pipeline.progress import Progress
from pipeline.recipe import Recipe, SweepConfig, SweepRange
from pipeline.sweep.search import Search
from pipeline.sweep.space import Params, trial_name
from pipeline.sweep.trial_recipes import trial_training

if TYPE_CHECKING:
    from pipeline.cluster.placement import Allocation
    from pipeline.sweep.trials import TrialSettings

ENDLESS = 10**9  # ASHA's max_t: it stops a trial that reaches it, which would be before the model is exported


def allocate_trials(recipe: Recipe, search: Search) -> Allocation:
    """How the cluster, as it is now, is divided among the trials.

    Raises:
        UserError: it has no room for one.
    """
    from pipeline.cluster.connect import connect
    from pipeline.cluster.placement import live_nodes

    connect(recipe.cluster.address)
    train = trial_training(recipe, search.label)
    return allocate(
        recipe,
        live_nodes(),
        trainings=min(search.n_trials, recipe.sweep.max_concurrent_trials or search.n_trials),
        workers=train.workers,
        use_gpu=train.use_gpu,
        judged=search.task is not None,
    )


def run_trials(settings: TrialSettings, queue: Any, concurrent: int, progress: Progress) -> list[dict[str, Any]]:
    """Run the trials that are not finished; gives the records of all, in the order of the grid or of their start.

    Args:
        queue: handle of a `JudgingQueue`.
        concurrent: trials at a time.
    """
    # Ctrl-C must end the sweep, and Tune must write no files or tables of its own
    quiet = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    os.environ |= {"TUNE_DISABLE_SIGINT_HANDLER": "1"} | quiet
    from ray import tune

    from pipeline.events.watch import watching
    from pipeline.sweep.callback import SweepCallback
    from pipeline.sweep.trials import run_trial, trial_records

    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    search, sweep = settings.search, settings.recipe.sweep
    callback = SweepCallback(settings, progress)
    space: dict[str, Any] = {}
    sampler, samples = None, search.n_trials
    known = trial_records(settings)
    kept = sum(settings.keeps(trial) for trial in known)
    if search.grid is not None:
        space, samples = {"params": tune.grid_search(search.grid)}, 1
    else:
        sampler, samples = _sampler(sweep, search, settings, known)
    scheduler = None
    if sweep.scheduler == "asha":
        grace = sweep.grace_period or search.judge_every or settings.recipe.train_of(search.label).eval_every or 1
        scheduler = tune.schedulers.ASHAScheduler(
            time_attr="step", metric=search.metric, mode=search.mode, max_t=ENDLESS, grace_period=grace,
            reduction_factor=sweep.reduction_factor,
        )  # fmt: skip
    if search.grid is not None or kept < search.n_trials:
        storage = settings.folder.ray
        shutil.rmtree(storage / "tune", ignore_errors=True)
        trainable = tune.with_parameters(run_trial, settings=settings, queue=queue)
        tuner = tune.Tuner(
            # the trial's own actor needs no CPU, but Tune refuses an empty request: ask for one byte of memory
            tune.with_resources(trainable, tune.PlacementGroupFactory([{"memory": 1}])),
            param_space=space,
            tune_config=tune.TuneConfig(
                search_alg=sampler, scheduler=scheduler, num_samples=samples,
                max_concurrent_trials=1 if search.by_preference else concurrent,
            ),
            run_config=tune.RunConfig(
                name="tune", storage_path=str(storage), verbose=0, callbacks=[callback],
                failure_config=tune.FailureConfig(max_failures=sweep.max_failures),
            ),
        )  # fmt: skip
        with watching(settings.folder, progress):
            tuner.fit()
    records = {trial["name"]: trial for trial in trial_records(settings)}
    if search.grid is None:
        return sorted(records.values(), key=lambda trial: trial["started"])
    lost = search.named | {"state": "failed", "error": "the trial never started"}
    names = {search.trial_name(params): params for params in search.grid}
    return [records.get(name, {"name": name, "params": params} | lost) for name, params in names.items()]


def _sampler(
    sweep: SweepConfig, search: Search, settings: TrialSettings, known: list[dict[str, Any]]
) -> tuple[Any, int]:
    """Who proposes values, and how many trials Tune runs."""
    if not search.by_preference:
        return _optuna(sweep, search, [trial["params"] for trial in known]), search.n_trials
    from pipeline.sweep.preferences import PreferenceSearch

    space = {key: values for key, values in search.space.items() if isinstance(values, SweepRange)}
    earlier = sorted(known, key=lambda trial: trial["started"])
    kept = sum(settings.keeps(trial) for trial in known)
    searcher = PreferenceSearch(
        space, search.metric, search.n_trials, earlier, seed=sweep.seed + kept, label=search.named.get("label")
    )
    return searcher, search.n_trials - kept


def _optuna(sweep: SweepConfig, search: Search, known: list[Params]) -> Any:
    """Optuna's TPE sampler, which begins with the trials of an earlier call: finished ones are only reported again."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, Any] = {}
    for key, values in search.space.items():
        if not isinstance(values, SweepRange):
            space[key] = optuna.distributions.CategoricalDistribution(values)
        elif values.integer:
            space[key] = optuna.distributions.IntDistribution(int(values.low), int(values.high), log=values.log)
        else:
            space[key] = optuna.distributions.FloatDistribution(values.low, values.high, log=values.log)
    begun = list({trial_name(params): params for params in known}.values())
    metric: Any = list(search.objectives) if len(search.objectives) > 1 else search.metric
    mode: Any = list(search.objectives.values()) if len(search.objectives) > 1 else search.mode
    return OptunaSearch(space, metric=metric, mode=mode, seed=sweep.seed + len(begun), points_to_evaluate=begun or None)
