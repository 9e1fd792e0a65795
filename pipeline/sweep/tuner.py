"""Ray Tune over the trials of a sweep: how many at once, who proposes their values, who stops them early."""

from __future__ import annotations

import logging
import os
import shutil
from typing import TYPE_CHECKING, Any

from pipeline.progress import Progress
from pipeline.recipe import Recipe, SweepRange
from pipeline.sweep.search import Search, trial_name, trial_training

if TYPE_CHECKING:
    from pipeline.cluster.placement import Allocation
    from pipeline.sweep.trials import TrialSettings

ENDLESS = 10**9  # ASHA's max_t: it stops a trial that reaches it, which would be before the model is exported


def allocate(recipe: Recipe, search: Search) -> Allocation:
    """How the cluster, as it is now, is divided among the trials.

    Raises:
        UserError: it has no room for one.
    """
    from pipeline.cluster.connect import connect
    from pipeline.cluster.placement import TrainingRoom, allocate_trials, check_engines, has_gpu, live_nodes

    connect(recipe.cluster.address)
    train, generate = trial_training(recipe, search.label), recipe.generate
    nodes = live_nodes()
    on_gpu = TrainingRoom.of(nodes).check(train.workers, use_gpu=train.use_gpu)
    engines, engine_gpus = generate.workers if search.task else 0, generate.tensor_parallel_size if has_gpu() else 0
    if engines:
        check_engines(engines, engine_gpus, nodes)
    return allocate_trials(
        nodes,
        trials=min(search.n_trials, recipe.sweep.max_concurrent_trials or search.n_trials),
        workers=train.workers,
        engines=engines,
        engine_gpus=engine_gpus,
        on_gpu=on_gpu,
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
    sampler, remaining = None, search.n_trials
    if search.grid is not None:
        space = {"params": tune.grid_search(search.grid)}
        remaining = 1
    else:
        known = [trial for trial in trial_records(settings) if trial["state"] == "done"]
        remaining = search.n_trials - len(known)
        sampler = _optuna(sweep.params, search, sweep.seed, known)
    scheduler = None
    if sweep.scheduler == "asha":
        grace = sweep.grace_period or settings.recipe.train_of(search.label).eval_every or 1
        scheduler = tune.schedulers.ASHAScheduler(
            time_attr="step", metric=search.metric, mode=search.mode, max_t=ENDLESS, grace_period=grace,
            reduction_factor=sweep.reduction_factor,
        )  # fmt: skip
    if remaining > 0:
        storage = settings.folder.ray
        shutil.rmtree(storage / "tune", ignore_errors=True)
        trainable = tune.with_parameters(run_trial, settings=settings, queue=queue)
        tuner = tune.Tuner(
            # the trial's own actor needs no CPU, but Tune refuses an empty request: ask for one byte of memory
            tune.with_resources(trainable, tune.PlacementGroupFactory([{"memory": 1}])),
            param_space=space,
            tune_config=tune.TuneConfig(
                search_alg=sampler, scheduler=scheduler, num_samples=remaining, max_concurrent_trials=concurrent
            ),
            run_config=tune.RunConfig(name="tune", storage_path=str(storage), verbose=0, callbacks=[callback]),
        )  # fmt: skip
        with watching(settings.folder, progress):
            tuner.fit()
        callback.settle()
    records = {trial["name"]: trial for trial in trial_records(settings)}
    if search.grid is None:
        return sorted(records.values(), key=lambda trial: trial["started"])
    lost = {"state": "failed", "error": "the trial never started"}
    return [records.get(trial_name(p), {"name": trial_name(p), "params": p} | lost) for p in search.grid]


def _optuna(params: dict[str, Any], search: Search, seed: int, known: list[dict[str, Any]]) -> Any:
    """Optuna's TPE sampler, told of the trials that an earlier call finished."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, Any] = {}
    for key, values in params.items():
        if not isinstance(values, SweepRange):
            space[key] = optuna.distributions.CategoricalDistribution(values)
        elif values.integer:
            space[key] = optuna.distributions.IntDistribution(int(values.low), int(values.high), log=values.log)
        else:
            space[key] = optuna.distributions.FloatDistribution(values.low, values.high, log=values.log)
    return OptunaSearch(
        space, metric=search.metric, mode=search.mode, seed=seed + len(known),
        points_to_evaluate=[trial["params"] for trial in known] or None,
        evaluated_rewards=[trial["figures"][search.metric] for trial in known] or None,
    )  # fmt: skip
