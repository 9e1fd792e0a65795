"""Recipes that a sweep makes of one: of each trial, and with the best values; what must be trained before them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from pipeline.recipe import Recipe, TrainConfig, make_recipe, set_key
from pipeline.run.folder import RunFolder
from pipeline.sweep.space import Params


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


def labels_before_trials(recipe: Recipe, labels: Sequence[str], *, judged: bool) -> list[str]:
    """The labels that must be trained before the trials: their frozen models, and one that judges them.

    Args:
        labels: those that trials train. judged: whether outputs of trials are judged.
    """
    needed = {of for label in labels for of in frozen_labels(recipe, label)}
    needed |= {recipe.judge.own_model or ""} if judged else set()
    return [name for name in recipe.methods if name in needed]


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
    """The whole recipe with the best values, under a name of its own, for `otpo run`."""
    tree = with_params(recipe, params).model_dump(mode="json")
    return make_recipe(tree | {"name": f"{recipe.name}-best", "sweep": {}})


def of_label(params: Params, label: str) -> Params:
    """A trial's values as the label's own: what a key of `train` says for it alone."""
    general_first = sorted(params.items(), key=lambda item: item[0].startswith("methods."))
    return {f"methods.{label}.{key.split('.')[-1]}": value for key, value in general_first}
