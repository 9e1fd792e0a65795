"""Recipes as files: YAML plus dotted overrides.

otpo run jobs/recipes/small_world.yaml methods.otpo.reg=0.03 train.seed=1
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from otpo.errors import UserError
from pipeline.recipe.recipe import Recipe, make_recipe
from pipeline.recipe.sections import long_form
from pipeline.recipe.yaml_text import load_yaml


def parse_value(text: str) -> Any:
    """The value of one override, read as YAML.

    Raises:
        UserError: it is not YAML.
    """
    return load_yaml(text, f"the value {text!r}")


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and put `key.path=value` overrides over it.

    Args:
        path: a YAML file, or the name of a recipe that ships with the project.
        overrides: `train.max_steps=50`, `methods.otpo.reg=0.03`; the value is YAML.

    Raises:
        UserError: the file is missing, is not YAML, or does not make a recipe; the message names each key.
    """
    file, overrides = find_recipe(path), list(overrides)
    data = f" Name it in one, data: {{path: {file}}}, or see what it holds with `otpo data {file}`."
    if "".join(file.suffixes[-2:]).removesuffix(".gz").endswith((".jsonl", ".csv", ".parquet")):
        raise UserError(f"{file}: expected a recipe (YAML), found a data file.{data}")
    try:
        tree = load_yaml(file.read_text(), str(file))
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        rows = isinstance(tree, list) and all(isinstance(row, dict) for row in tree)
        found = "nothing: it is empty" if tree is None else "a list of rows" if rows else type(tree).__name__
        raise UserError(
            f"{file}: expected a recipe with sections such as model, data and methods; found {found}.{data * rows}"
        )
    changed = apply_overrides(tree, overrides)
    try:
        return make_recipe(changed, where=str(file))
    except UserError:
        wrong = _wrong_overrides(tree, overrides)
        if not wrong:
            raise
        return make_recipe(changed, where=f"{file} with {' '.join(wrong)}")


def _wrong_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> list[str]:
    """The overrides that a tree is no recipe with; none where it is none without them either."""

    def fails(*some: str) -> bool:
        try:
            Recipe.model_validate(apply_overrides(tree, some))
        except (ValidationError, UserError):
            return True
        return False

    return [] if fails() else [override for override in overrides if fails(override)]


def find_recipe(path: str | Path) -> Path:
    """A path as it is, or the name of a recipe in `jobs/recipes`."""
    shipped = Path(__file__).parents[2] / "jobs" / "recipes"
    for candidate in (Path(path), shipped / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    names = ", ".join(sorted(p.stem for p in shipped.glob("*.yaml")))
    raise UserError(f"No recipe at '{path}'. Give a YAML file, or one of the shipped recipes: {names}.")


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of the tree with each `key.path=value` set."""
    tree = copy.deepcopy(tree)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(
                f"'{override}' is not an override: expected key.path=value, for example train.max_steps=50."
            )
        set_key(tree, key, load_yaml(text, f"the value of {override}"))
    return tree


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in place, making sections on the way."""
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        if tree.get(parent) is None:
            tree[parent] = {}
        if not depth:
            tree[parent] = long_form(parent, tree[parent])
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise UserError(f"'{key}': {'.'.join(parents[: depth + 1])} is a value, not a section.")
    tree[last] = value


def dump_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
