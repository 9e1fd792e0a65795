"""One row of the tables of other trainers' keys: what does it here, or why nothing has to."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

Config = Mapping[str, Any]
"""The other trainer's configuration, flat: key -> value."""

Settings = dict[str, Any]
"""Dotted keys of a recipe -> values."""


def as_it_is(value: Any, config: Config) -> Any:
    """The value means the same here."""
    return value


@dataclass(frozen=True)
class Hint:
    """The answer for a key of another trainer.

    Attributes:
        key: of a recipe; empty where no one key says the same.
        note: a sentence about it, without a full stop: what differs, or why it is not needed.
        convert: (value, whole configuration) -> the value of `key`, or, without a `key`, a dictionary of dotted keys;
            None where there is nothing to set.
    """

    key: str = ""
    note: str = ""
    convert: Callable[[Any, Config], Any] = field(default=as_it_is, compare=False)

    def settings(self, value: Any, config: Config) -> Settings:
        """The keys of a recipe that say what `value` says; empty where none has to be set."""
        if not self.key and self.convert is as_it_is:
            return {}
        try:
            found = self.convert(value, config)
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError):
            return {}  # a value that the other trainer would not take either
        if found is None:
            return {}
        return {self.key: found} if self.key else found

    def answer(self, value: Any, config: Config) -> str:
        """What to write here instead, as the end of an error's line."""
        settings = self.settings(value, config)
        if settings:
            here = "Here it is " + ", ".join(f"`{key}: {_flow(value)}`" for key, value in settings.items())
        else:
            here = f"Here it is `{self.key}`" if self.key else ""
        text = "; ".join(part for part in (here, self.note) if part)
        return (text if re.match(r"[\w-]*[.`_]", text) else text[:1].upper() + text[1:]) + "."

    @property
    def about(self) -> str:
        """The answer for any value, as the documentation prints it."""
        return ": ".join(part for part in (f"`{self.key}`" if self.key else "", self.note) if part)


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().removesuffix("\n...").strip()


def not_needed(why: str) -> Hint:
    """Something happens by itself, or has no counterpart here; `why` says which."""
    return Hint(note=why)


def each(names: str, hint: Hint) -> dict[str, Hint]:
    """The same answer for several keys."""
    return dict.fromkeys(names.split(), hint)
