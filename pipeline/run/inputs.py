"""What stages are made from, as JSON: the parts of a recipe that can change a stage's result.

The manifest keeps the hash of each stage's inputs. A key that is added or renamed here makes every finished run stale.
"""

from __future__ import annotations

from typing import Any

from otpo.data.template import Rendering
from pipeline.recipe import EXECUTION_KEYS_OF_TRAINING, LATER_KEYS_OF_TRAINING, Recipe, identity


def reading_inputs(recipe: Recipe) -> dict[str, Any]:
    """How rows become tokens. Which rows is told by the file's content, wherever the file lies."""
    data = {key: value for key, value in identity(recipe)["data"].items() if key != "path"}
    mix = {
        name: {key: value for key, value in each.items() if key != "path"}
        for name, each in data.pop("datasets").items()
    }
    strategy = data.pop("stopping_strategy")
    data |= {"datasets": mix, "stopping_strategy": strategy} if mix else {}
    return {key: value for key, value in data.items() if key not in _WHERE_SET or value != _WHERE_SET[key]}


_WHERE_SET: dict[str, Any] = {"columns": {}, "chat_template_kwargs": None, "rewritten": "refuse"}
"""Keys that count only where they are not at their default: runs from before them stay finished."""


def training_inputs(recipe: Recipe, label: str) -> dict[str, Any]:
    """How a label is trained, beside its method."""
    train = recipe.train_of(label).model_dump(mode="json")
    left_out = {key for key, default in LATER_KEYS_OF_TRAINING.items() if train[key] == default}
    left_out.update(EXECUTION_KEYS_OF_TRAINING)
    kept = {key: value for key, value in train.items() if key not in left_out}
    names = ("lora", "quantization") if recipe.model.lora else ()
    return kept | {name: identity(recipe)["model"][name] for name in names}


def engine_inputs(recipe: Recipe, template: Rendering) -> dict[str, Any]:
    """What generates, and how the run renders prompts."""
    generate = identity(recipe)["generate"]
    return {key: generate[key] for key in ("backend", "dtype", "max_model_len")} | {"template": str(template)}


def sampling_inputs(recipe: Recipe) -> dict[str, Any]:
    """How outputs are drawn; also the arguments of `Sampling`."""
    generate = identity(recipe)["generate"]
    return {key: generate[key] for key in ("temperature", "top_p", "max_tokens", "seed")}
