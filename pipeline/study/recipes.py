"""The recipes that a study makes of one: of each regime, and of each seed with the values that tuning found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from otpo.errors import UserError
from pipeline.recipe import Recipe, make_recipe, set_key
from pipeline.sweep.search import plan


@dataclass(frozen=True)
class Regime:
    """One setting in which the methods are tuned and compared.

    Attributes:
        name: as in `study.regimes`; the study's own name where it has none.
        recipe: of its sweep.
        labels: that are tuned.
    """

    name: str
    recipe: Recipe
    labels: list[str]


def regimes(recipe: Recipe) -> list[Regime]:
    """Check a study; gives its regimes in order.

    Raises:
        UserError: nothing to tune, a regime that is no recipe, or a seed that tuning uses too.
    """
    if not recipe.study.regimes:
        return [_regime(recipe.name, recipe)]
    found = []
    for name, changes in recipe.study.regimes.items():
        tree = recipe.model_dump(mode="json") | {"study": {"seeds": recipe.study.seeds}}
        for key, value in _leaves(changes):
            set_key(tree, key, value)
        tree["name"] = f"{recipe.name}-{name}"
        found.append(_regime(name, make_recipe(tree, where=f"study.regimes.{name}")))
    return found


def _regime(name: str, recipe: Recipe) -> Regime:
    labels = [search.label for search in plan(recipe)]
    tuned_with = {recipe.train_of(label).seed for label in labels}
    tuned_with |= {recipe.world.get("seed", 0)} if recipe.world is not None else set()
    if used := tuned_with & set(recipe.study.seeds):
        raise UserError(
            f"study.seeds: methods are tuned with seed {min(used)} (train.seed or world.seed), which would flatter what"
            " was chosen by it: take other seeds for the comparison."
        )
    return Regime(name, recipe, labels)


def seed_recipe(regime: Recipe, tuned: Recipe, seed: int) -> Recipe:
    """The recipe of one seed.

    Args:
        regime: of the sweep; names the run.
        tuned: with the best values (`best.yaml`).
        seed: of training, and of the world where there is one.
    """
    tree = tuned.model_dump(mode="json")
    tree |= {"name": f"{regime.name}-seed-{seed}", "sweep": {}, "study": {}}
    tree["train"] |= {"seed": seed}
    tree["methods"] = {label: {**settings, "seed": seed} for label, settings in tree["methods"].items()}
    if tree["world"] is not None:
        tree["world"] |= {"seed": seed}
    return make_recipe(tree)


def tuned_values(regime: Regime, tuned: Recipe) -> dict[str, dict[str, Any]]:
    """Label -> the values that tuning chose, by the keys' last parts."""
    values: dict[str, dict[str, Any]] = {}
    for search in plan(regime.recipe):
        names = [key.split(".")[-1] for key in search.space]
        settings = tuned.method(search.label).hyperparameters | tuned.train_of(search.label).model_dump()
        values[search.label] = {name: settings[name] for name in names}
    return values


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
