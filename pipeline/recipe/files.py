"""Recipes as files: YAML plus dotted overrides.

otpo run jobs/recipes/small_world.yaml methods.otpo.reg=0.03 train.seed=1
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from otpo.errors import UserError
from pipeline.recipe.recipe import Recipe, make_recipe


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `5e-7` as a string; people mean the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF)|-\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def parse_value(text: str) -> Any:
    """The value of one override, read as YAML."""
    return yaml.load(text, Loader=_Loader)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and put `key.path=value` overrides over it.

    Args:
        path: a YAML file, or the name of a recipe that ships with the project.
        overrides: `train.max_steps=50`, `methods.otpo.reg=0.03`; the value is YAML.

    Raises:
        UserError: the file is missing, is not YAML, or does not make a recipe; the message names each key.
    """
    file = find_recipe(path)
    try:
        tree = yaml.load(file.read_text(), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(
            f"{file}: expected a recipe with sections such as model, data and methods; found {type(tree).__name__}."
        )
    return make_recipe(apply_overrides(tree, overrides), where=str(file))


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
        try:
            set_key(tree, key, parse_value(text))
        except yaml.YAMLError as error:
            raise UserError(f"'{override}': the value is not YAML: {error}") from error
    return tree


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in place, making sections on the way."""
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents):
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise UserError(f"'{key}': {'.'.join(parents[: depth + 1])} is a value, not a section.")
    tree[last] = value


def dump_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
