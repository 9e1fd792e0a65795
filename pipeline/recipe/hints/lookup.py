"""Answers for keys of other trainers, and whole configurations of theirs as recipes.

answer_for("report_to", "wandb", {})   # "... Here it is `tracking: [wandb]`; one of ..."
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.recipe.hints.axolotl import AXOLOTL
from pipeline.recipe.hints.convert import method_of
from pipeline.recipe.hints.hint import Config, Hint, Settings
from pipeline.recipe.hints.llama_factory import LLAMA_FACTORY
from pipeline.recipe.hints.openrlhf import OPENRLHF
from pipeline.recipe.hints.transformers import TRANSFORMERS
from pipeline.recipe.hints.trl import TRL

TABLES: dict[str, dict[str, Hint]] = {
    "transformers": TRANSFORMERS,
    "TRL": TRL,
    "axolotl": AXOLOTL,
    "LLaMA-Factory": LLAMA_FACTORY,
    "OpenRLHF": OPENRLHF,
}
"""Trainer -> its keys. A key of an earlier table is not repeated in a later one."""

KEYS: dict[str, Hint] = {key: hint for table in reversed(TABLES.values()) for key, hint in table.items()}

ENOUGH = 3  # keys of other trainers that make a file one of theirs


def answer_for(key: str, value: Any, config: Config) -> str | None:
    """What does here what `key: value` does elsewhere; None for a key that no table has.

    Args:
        config: the configuration that the key stands in, whose other keys may decide what it means.
    """
    hint = KEYS.get(key)
    return None if hint is None else hint.answer(value, config)


def flat(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a recipe's tree with its value, without its section."""
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        yield str(key), value
        yield from flat(value)


def looks_foreign(tree: Mapping[str, Any], sections: Collection[str]) -> bool:
    """Whether a tree is another trainer's configuration rather than a recipe.

    Args:
        sections: the keys that a recipe has at its top.
    """
    foreign = [key for key in tree if key in KEYS and key not in sections]
    return len(foreign) >= ENOUGH and not (isinstance(tree.get("model"), Mapping) or "methods" in tree)


@dataclass(frozen=True)
class Translation:
    """Another trainer's configuration as a recipe.

    Attributes:
        settings: dotted keys of the recipe.
        notes: answer -> the keys that it answers, of those that `settings` does not hold.
        unknown: keys that no table has.
    """

    trainer: str
    settings: Settings
    notes: dict[str, list[str]]
    unknown: list[str]


def translate(tree: Mapping[str, Any], sections: Collection[str]) -> Translation:
    """Another trainer's configuration as a recipe.

    Args:
        sections: the keys that a recipe has at its top.
    """
    found = Translation(_trainer(tree), {}, {}, [])
    for key, value in tree.items():
        if key not in KEYS:
            if key in sections:
                found.settings[key] = value
            else:
                found.unknown.append(key)
        elif settings := KEYS[key].settings(value, tree):
            found.settings.update(settings)
        else:
            found.notes.setdefault(KEYS[key].answer(value, tree), []).append(key)
    if not any(key.startswith("methods.") for key in found.settings):
        found.settings[f"methods.{method_of(tree)}"] = {}
    if "train.micro_batch_size" in found.settings:  # one step takes it once where nothing is accumulated
        found.settings.setdefault("train.global_batch_size", found.settings["train.micro_batch_size"])
    return found


def _trainer(tree: Mapping[str, Any]) -> str:
    """The trainer whose own keys a configuration has most of; TRL where it has none but transformers'."""
    counts = {name: sum(key in table for key in tree) for name, table in TABLES.items() if name != "transformers"}
    return max(counts, key=lambda name: counts[name])
