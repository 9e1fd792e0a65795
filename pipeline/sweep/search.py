"""What a sweep tries and what it optimises, checked before anything starts. Light to import.

`sweep: {params: {methods.otpo.reg: [0.01, 0.03, 0.1, 0.3]}, metric: win_rate}`
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from otpo.errors import UserError
from pipeline.recipe import Recipe, SweepRange
from pipeline.recipe.judged import JUDGED, LENGTHS
from pipeline.sweep.space import Params, Space, combinations, space_of, trial_name
from pipeline.sweep.trial_recipes import with_params

EVALUATED = (
    "eval_loss",
    *(f"eval_rewards/{name}" for name in ("accuracies", "margins", "chosen", "rejected")),
    *(f"eval_logps/{name}" for name in ("chosen", "rejected")),
)
LEVEL = 50.0  # the win rate, in percent, of a trial that is as good as the one it is compared with
# keys of `train` that do not change a model
UNCHANGING = ("workers", "min_workers", "use_gpu", "max_failures", "keep_checkpoints")


@dataclass(frozen=True)
class Search:
    """A checked search for one label's values.

    Attributes:
        label: of `methods`: what every trial trains.
        space: the values to try of each key.
        objectives: metric -> "min" or "max"; the first one names the winner.
        task: whose outputs are judged; None where the metric comes from evaluations during training.
        grid: the values of every trial for grid and random; None for optuna and glisp, which choose as they go.
        judge_every: steps between models that are judged while a trial trains; None judges the trained model alone.
        by_preference: whether each trial is judged against the best one before it, not against the reference.
        of_several: whether the sweep searches for a list of labels: names and records of trials then say the label.
    """

    label: str
    space: Space
    objectives: dict[str, Literal["min", "max"]]
    task: str | None
    grid: list[Params] | None
    n_trials: int
    judge_every: int | None = None
    by_preference: bool = False
    of_several: bool = False

    @property
    def metric(self) -> str:
        """The objective that names the winner."""
        return next(iter(self.objectives))

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether less or more of `metric` is better."""
        return self.objectives[self.metric]

    @property
    def named(self) -> dict[str, str]:
        """What a trial's record and row say of its label: nothing where the sweep has only one."""
        return {"label": self.label} if self.of_several else {}

    def trial_name(self, params: Params) -> str:
        """The name and folder of a trial: `reg-0.03_beta-0.1`, or `otpo.reg-0.03_beta-0.1` beside other labels."""
        return trial_name(params, self.label if self.of_several else None)


def plan(recipe: Recipe) -> list[Search]:
    """Check the recipe's `sweep` section; gives the search of each label, all with as many trials.

    Raises:
        UserError: nothing to sweep, a key or value that no recipe takes, a key without effect, an unknown metric, a
            metric that the recipe cannot produce, or labels with unequal numbers of trials.
    """
    sweep = recipe.sweep
    if not sweep.params:
        raise UserError(
            "sweep.params is empty: say what to try, for example `sweep: {params: {methods.otpo.reg: [0.03, 0.1]}}`"
            " or sweep.params.methods.otpo.reg='[0.03, 0.1, 0.3]' on the command line."
        )
    labels = _labels(recipe)
    if chosen := [label for label in labels if recipe.train_of(label).selects_by_judge]:
        raise UserError(
            f"train.best_metric of '{chosen[0]}' is {recipe.train_of(chosen[0]).best_metric}, by which a run chooses"
            " among judged models; a sweep judges trials by sweep.metric: leave best_metric out, or take a figure of an"
            " evaluation."
        )
    spaces = {label: space_of(sweep, label) for label in labels}
    for label, space in spaces.items():
        for key, values in space.items():
            _check_values(recipe, label, key, values)
    tasks = {_check_metric(recipe, label, metric) for label in labels for metric in sweep.objectives} - {None}
    if sweep.scheduler == "asha" and len(sweep.objectives) > 1:
        raise UserError(
            f"sweep.scheduler asha stops trials by one metric, and sweep.metric has {len(sweep.objectives)}: name one,"
            " or take scheduler none."
        )
    by_preference = sweep.search == "glisp"
    if by_preference:
        _check_preferences(recipe)
    judge_every = _judge_every(recipe, judged=bool(tasks))
    searches = []
    for label, space in spaces.items():
        grid = None if sweep.search in ("optuna", "glisp") else combinations(sweep, space)
        search = Search(
            label=label,
            space=space,
            objectives=sweep.objectives,
            task=next(iter(tasks), None),
            grid=grid,
            n_trials=sweep.num_samples if grid is None else len(grid),
            judge_every=judge_every,
            by_preference=by_preference,
            of_several=isinstance(sweep.label, list),
        )
        searches.append(search)
    _check_budgets(searches)
    return searches


def check_glis() -> None:
    """Refuse a search by preferences where its package is missing.

    Raises:
        UserError: says how to install it.
    """
    if find_spec("glis") is None:
        raise UserError("sweep.search glisp needs the package glis: pip install 'otpo-pipeline[glisp]'.")


def _labels(recipe: Recipe) -> list[str]:
    """The labels that are tuned; every key of `params` is one that can be swept."""
    sweep = recipe.sweep
    for key in sweep.params:
        parts = key.split(".")
        if parts[0] not in ("methods", "train") or len(parts) != {"methods": 3, "train": 2}[parts[0]]:
            raise UserError(
                f"sweep.params: '{key}' is not a key of a method or of train: expected methods.LABEL.KEY or train.KEY."
            )
        if parts[0] == "methods" and parts[1] not in recipe.methods:
            raise UserError(
                f"sweep.params: '{key}': the recipe has no label '{parts[1]}'. It has:"
                f" {', '.join(recipe.methods) or 'none'}."
            )
        if parts[-1] in UNCHANGING:
            raise UserError(f"sweep.params: '{key}' does not change what is trained; set it for the whole recipe.")
    named = list(dict.fromkeys(key.split(".")[1] for key in sweep.params if key.startswith("methods.")))
    known = ", ".join(recipe.methods) or "(the recipe has no methods)"
    labels = sweep.labels or named or list(recipe.methods)
    if not sweep.labels and len(labels) != 1:
        raise UserError(
            f"A sweep tunes one label, and params name {', '.join(named) or 'none'}: set sweep.label to one of {known};"
            " or to a list of them, each of which is then tuned with as many trials."
        )
    if unknown := [label for label in labels if label not in recipe.methods]:
        raise UserError(f"sweep.label: the recipe has no label '{unknown[0]}'. It has: {known}.")
    if foreign := [label for label in named if label not in labels]:
        raise UserError(
            f"A sweep tunes one label or those of a list, and params have keys of '{foreign[0]}', which sweep.label"
            f" does not name ({', '.join(labels)}): add it there, or leave its keys out."
        )
    for label in labels:
        if not space_of(sweep, label):
            raise UserError(
                f"sweep.params has nothing to try for '{label}', which sweep.label names: add a key of train or"
                f" methods.{label}, or leave the label out."
            )
    return labels


def _check_budgets(searches: Sequence[Search]) -> None:
    """Refuse a comparison in which one method was tuned with more trials than another."""
    if len({search.n_trials for search in searches}) > 1:
        counts = ", ".join(f"{search.n_trials} of {search.label}" for search in searches)
        raise UserError(
            f"sweep.label: labels are tuned with equal budgets, and these values give different numbers of trials"
            f" ({counts}): list as many combinations for each, or take search random or optuna, with ranges and"
            " num_samples."
        )


def _check_values(recipe: Recipe, label: str, key: str, values: list[Any] | SweepRange) -> None:
    if isinstance(values, SweepRange):
        if recipe.sweep.search == "grid":
            raise UserError(
                f"sweep.params: '{key}' is a range, and a grid needs a list: list values, or set"
                " sweep.search to random, optuna or glisp."
            )
        values = [int(v) if values.integer else v for v in (values.low, values.high)]
    if not values:
        raise UserError(f"sweep.params: '{key}' has no values.")
    if len({trial_name({key: value}) for value in values}) < len(values):
        raise UserError(f"sweep.params: '{key}' has a value twice: list each value once.")
    outcomes = []
    for value in values:
        changed = with_params(recipe, {key: value})
        outcomes.append(json.dumps([changed.train_of(label).model_dump(), changed.method(label).settings]))
    if len(set(outcomes)) == 1 and len(values) > 1:
        raise UserError(
            f"sweep.params: '{key}' changes nothing: methods.{label} has a `{key.rsplit('.', 1)[-1]}` of its own. Sweep"
            f" methods.{label}.{key.rsplit('.', 1)[-1]} instead."
        )


def _judge_every(recipe: Recipe, *, judged: bool) -> int | None:
    """Steps between judged milestones of a trial; None for none."""
    sweep = recipe.sweep
    if not judged:
        if sweep.judge_every:
            raise UserError(
                f"sweep.judge_every is for metrics of a judge, and sweep.metric is {', '.join(sweep.objectives)}, which"
                " evaluations give every train.eval_every steps: leave judge_every out."
            )
        return None
    if sweep.scheduler != "asha":
        return sweep.judge_every
    every = sweep.judge_every or recipe.train.eval_every
    if every is None:
        raise UserError(
            f"sweep.scheduler asha compares trials while they train, and {next(iter(sweep.objectives))} comes after:"
            " set sweep.judge_every to the steps after which models are judged on the way, or take scheduler none."
        )
    return every


def _check_preferences(recipe: Recipe) -> None:
    sweep = recipe.sweep
    if sweep.scheduler == "asha" or sweep.judge_every:
        raise UserError(
            "sweep.search glisp compares trained models only: leave sweep.judge_every out, and take scheduler none."
        )
    if len(sweep.objectives) > 1 or not set(sweep.objectives) <= set(JUDGED):
        raise UserError(
            f"sweep.search glisp compares outputs of two trials by one of {', '.join(JUDGED)}; sweep.metric is"
            f" {', '.join(sweep.objectives)}."
        )
    for key, values in sweep.params.items():
        if not isinstance(values, SweepRange):
            raise UserError(f"sweep.params: '{key}' is a list, and glisp needs ranges: {{low: ..., high: ...}}.")


def _check_metric(recipe: Recipe, label: str, metric: str) -> str | None:
    """The task to judge, or None for a metric of an evaluation."""
    sweep = recipe.sweep
    if metric in (*JUDGED, *LENGTHS):
        if recipe.trains_rewards(label):
            raise UserError(
                f"sweep.metric {metric} needs outputs, and '{label}' is a reward model, which writes none: take"
                " eval_rewards/accuracies or eval_loss."
            )
        tasks = list(recipe.generate.named_tasks())
        judge = recipe.judge.url or recipe.judge.own_model
        if not tasks or not judge:
            needed = (("generate.tasks", tasks), ("judge.url, judge.vllm or judge.reward_model", judge))
            missing = " and ".join(key for key, value in needed if not value)
            raise UserError(
                f"sweep.metric {metric} needs outputs and a judge: set {missing}, or take a metric of an"
                " evaluation such as eval_loss."
            )
        if metric == "length_controlled_winrate" and not recipe.judge.calibration:
            raise UserError(
                "sweep.metric length_controlled_winrate needs judge.calibration; length_adjusted_winrate needs none."
            )
        if sweep.task and sweep.task not in tasks:
            raise UserError(f"sweep.task: no task '{sweep.task}'. generate.tasks has: {', '.join(tasks)}.")
        return sweep.task or tasks[0]
    if metric not in EVALUATED and not metric.startswith("eval_weights/"):
        known = (*JUDGED, *LENGTHS, *EVALUATED)
        near = difflib.get_close_matches(metric, known, n=1)
        raise UserError(
            f"sweep.metric: no metric '{metric}'.{f' Did you mean {near[0]}?' if near else ''} Known:"
            f" {', '.join(known)}."
        )
    if not recipe.train.eval_every or not recipe.data.validation:
        raise UserError(
            f"sweep.metric {metric} comes from evaluations: set train.eval_every to a number of steps, and"
            " keep data.validation above 0."
        )
    return None
