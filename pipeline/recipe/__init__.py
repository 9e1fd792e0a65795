"""Recipes: read, override, check, write."""

from pipeline.recipe.files import (
    apply_overrides,
    dump_yaml,
    find_recipe,
    load_recipe,
    parse_value,
    set_key,
)
from pipeline.recipe.identity import (
    EXECUTION_KEYS,
    EXECUTION_KEYS_OF_TRAINING,
    LATER_KEYS_OF_TRAINING,
    digest,
    identity,
)
from pipeline.recipe.recipe import Recipe, make_recipe
from pipeline.recipe.sections import WORLD_PREFIX, ModelConfig, TrainConfig
from pipeline.recipe.sweep import SweepConfig, SweepRange

__all__ = [
    "EXECUTION_KEYS",
    "EXECUTION_KEYS_OF_TRAINING",
    "LATER_KEYS_OF_TRAINING",
    "WORLD_PREFIX",
    "ModelConfig",
    "Recipe",
    "SweepConfig",
    "SweepRange",
    "TrainConfig",
    "apply_overrides",
    "digest",
    "dump_yaml",
    "find_recipe",
    "identity",
    "load_recipe",
    "make_recipe",
    "parse_value",
    "set_key",
]
