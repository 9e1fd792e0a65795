"""What a sweep tries and what it optimises, checked before anything starts. Light to import.

`sweep: {params: {methods.otpo.reg: [0.01, 0.03, 0.1, 0.3]}, metric: win_rate}`
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from otpo.errors import UserError
from pipeline.recipe import Recipe, SweepRange, TrainConfig, make_recipe, set_key
from pipeline.run.folder import RunFolder

Params = dict[str, Any]
"""Dotted key of a recipe -> value: what one trial changes."""

LENGTHS = ("avg_length", "length_ratio")
JUDGED = ("win_rate", "discrete_win_rate", "length_adjusted_winrate", "length_controlled_winrate")
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
    """A checked sweep.

    Attributes:
        label: of `methods`: what every trial trains.
        objectives: metric -> "min" or "max"; the first one names the winner.
        task: whose outputs are judged; None where the metric comes from evaluations during training.
        grid: the values of every trial for grid and random; None for optuna and glisp, which choose as they go.
        by_preference: whether each trial is judged against the best one before it, not against the reference.
    """

    label: str
    objectives: dict[str, Literal["min", "max"]]
    task: str | None
    grid: list[Params] | None
    n_trials: int
    by_preference: bool = False

    @property
    def metric(self) -> str:
        """The objective that names the winner."""
        return next(iter(self.objectives))

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether less or more of `metric` is better."""
        return self.objectives[self.metric]


def plan(recipe: Recipe) -> Search:
    """Check the recipe's `sweep` section.

    Raises:
        UserError: nothing to sweep, a key or value that no recipe takes, a key without effect, an unknown metric, or
            a metric that the recipe cannot produce.
    """
    sweep = recipe.sweep
    if not sweep.params:
        raise UserError(
            "sweep.params is empty: say what to try, for example `sweep: {params: {methods.otpo.reg: [0.03, 0.1]}}`"
            " or sweep.params.methods.otpo.reg='[0.03, 0.1, 0.3]' on the command line."
        )
    label = _label(recipe)
    for key, values in sweep.params.items():
        _check_values(recipe, label, key, values)
    tasks = {_check_metric(recipe, label, metric) for metric in sweep.objectives} - {None}
    if sweep.scheduler == "asha" and len(sweep.objectives) > 1:
        raise UserError(
            f"sweep.scheduler asha stops trials by one metric, and sweep.metric has {len(sweep.objectives)}: name one,"
            " or take scheduler none."
        )
    by_preference = sweep.search == "glisp"
    if by_preference:
        _check_preferences(recipe)
    grid = None if sweep.search in ("optuna", "glisp") else combinations(recipe)
    return Search(
        label=label,
        objectives=sweep.objectives,
        task=next(iter(tasks), None),
        grid=grid,
        n_trials=sweep.num_samples if grid is None else len(grid),
        by_preference=by_preference,
    )


def combinations(recipe: Recipe) -> list[Params]:
    """Every trial of a grid, or the seeded and distinct draws of a random search."""
    sweep = recipe.sweep
    keys, spaces = list(sweep.params), list(sweep.params.values())
    if sweep.search == "grid":
        lists = [space for space in spaces if isinstance(space, list)]
        found = [dict(zip(keys, values, strict=True)) for values in itertools.product(*lists)]
    else:
        generator = random.Random(sweep.seed)
        drawn = ({key: _draw(space, generator) for key, space in sweep.params.items()} for _ in range(1000))
        found = list(itertools.islice(_distinct(drawn), sweep.num_samples))
    return found


def _distinct(drawn: Iterable[Params]) -> Iterator[Params]:
    seen = set()
    for params in drawn:
        if (name := trial_name(params)) not in seen:
            seen.add(name)
            yield params


def _draw(space: list[Any] | SweepRange, generator: random.Random) -> Any:
    if isinstance(space, list):
        return generator.choice(space)
    if space.log:
        value = math.exp(generator.uniform(math.log(space.low), math.log(space.high)))
    else:
        value = generator.uniform(space.low, space.high)
    return rounded(round(value) if space.integer else value)


def rounded(value: Any) -> Any:
    """A drawn number with four significant digits: what the table shows is what was trained."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def trial_name(params: Params) -> str:
    """The name and folder of a trial: `reg-0.03_beta-0.1`."""
    short = short_keys(list(params))
    text = "_".join(f"{short[key]}-{_text(value)}" for key, value in params.items())
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)


def _text(value: Any) -> str:
    return (
        f"{value:.12g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
    )


def short_keys(keys: list[str]) -> dict[str, str]:
    """Dotted key -> its last part, or the whole key where two keys end alike."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def trial_recipe(
    recipe: Recipe, label: str, params: Params, name: str, run: RunFolder, *, seed: int | None = None
) -> Recipe:
    """The recipe of one trial: the label alone, called `name`, with the trial's values.

    Args:
        run: the folder in which the label's frozen models are trained.
        seed: of training; None for the label's own.
    """
    changed = with_params(recipe, params)
    tree = changed.model_dump(mode="json")
    frozen = {model: str(run.model(of)) for model, of in changed.frozen_labels(label).items()}
    settings = {"method": recipe.method(label).method.name, **tree["methods"][label], **frozen}
    settings |= {} if seed is None else {"seed": seed}
    return make_recipe(tree | {"methods": {name: settings}, "sweep": {}})


def trial_training(recipe: Recipe, label: str) -> TrainConfig:
    """How a trial trains: with the fewest workers of an elastic group, which would take the room of other trials."""
    train = recipe.train_of(label)
    return train.model_copy(update={"workers": train.fewest_workers, "min_workers": None})


def labels_before_trials(recipe: Recipe, search: Search) -> list[str]:
    """The labels that must be trained before the trials: their frozen models, and a reward model that judges them."""
    judge = recipe.judge.reward_model if search.task else None
    return frozen_labels(recipe, search.label) + ([judge] if judge in recipe.methods else [])


def frozen_labels(recipe: Recipe, label: str) -> list[str]:
    """The labels that trials read as frozen models, and those that these read in turn, in the recipe's order."""
    found = {of for tried in _tried(recipe) for of in tried.frozen_labels(label).values()}
    while more := {of for model in found for of in recipe.frozen_labels(model).values()} - found:
        found |= more
    return [name for name in recipe.methods if name in found]


def frozen_sources(recipe: Recipe, label: str) -> set[str]:
    """The frozen models that trials read and no label trains: folders, or hub names."""
    named = {source for tried in _tried(recipe) for source in tried.method(label).frozen_models.values()}
    return named - set(recipe.methods)


def _tried(recipe: Recipe) -> list[Recipe]:
    """The recipe as it is, and with each value of each list of values."""
    lists = {key: values for key, values in recipe.sweep.params.items() if isinstance(values, list)}
    return [recipe, *(with_params(recipe, {key: value}) for key, values in lists.items() for value in values)]


def with_params(recipe: Recipe, params: Params) -> Recipe:
    """The recipe with a trial's values."""
    tree = json.loads(recipe.model_dump_json())
    for key, value in params.items():
        set_key(tree, key, value)
    return make_recipe(tree, where=", ".join(f"{key}={value}" for key, value in params.items()))


def best_recipe(recipe: Recipe, params: Params) -> Recipe:
    """The whole recipe with the best trial's values, under a name of its own, for `otpo run`."""
    tree = with_params(recipe, params).model_dump(mode="json")
    return make_recipe(tree | {"name": f"{recipe.name}-best", "sweep": {}})


def check_glis() -> None:
    """Refuse a search by preferences where its package is missing.

    Raises:
        UserError: says how to install it.
    """
    if find_spec("glis") is None:
        raise UserError("sweep.search glisp needs the package glis: pip install 'otpo-pipeline[glisp]'.")


def _label(recipe: Recipe) -> str:
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
    candidates = [sweep.label] if sweep.label else named or list(recipe.methods)
    if len(candidates) != 1 or candidates[0] not in recipe.methods or not set(named) <= set(candidates):
        raise UserError(
            f"A sweep trains one label, and params name {named or 'none'}: set sweep.label to one of"
            f" {', '.join(recipe.methods) or '(the recipe has no methods)'}, and keep other labels' keys out of params."
        )
    return candidates[0]


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


def _check_preferences(recipe: Recipe) -> None:
    sweep = recipe.sweep
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
        if recipe.judge.vllm:
            raise UserError(
                "judge.vllm: a sweep's judge answers while trials train, so it needs a place of its own: serve the"
                " model with `vllm serve MODEL` on a node that the sweep leaves alone, and set judge.url."
            )
        judge = recipe.judge.url or recipe.judge.reward_model
        if not tasks or not judge:
            needed = (("generate.tasks", tasks), ("judge.url or judge.reward_model", judge))
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
        if sweep.scheduler == "asha":
            raise UserError(
                f"sweep.scheduler asha compares trials while they train, and {metric} comes after: take a"
                " metric such as eval_loss, or scheduler none."
            )
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
