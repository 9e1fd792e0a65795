"""What a row of a data file says, whatever its format: a prompt and its completions, still text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from otpo.files import Row

Messages = list[dict[str, Any]]
Text = str | Messages

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message under which templates expect a chain of thought."""


@dataclass(frozen=True)
class Parts:
    """A prompt and its completions, (chosen, rejected) or (completion,); each a string or a list of messages.

    Attributes:
        label: whether the one completion is a good one, where the row says it.
        notes: remarks that the report counts; the row is used all the same.
        tools: JSON schemas of functions, which the chat template shows to the model.
        template_kwargs: the row's own variables of the chat template, beside those of `data.chat_template_kwargs`.
    """

    prompt: Text
    completions: tuple[Text, ...]
    label: bool | None = None
    notes: tuple[str, ...] = ()
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Example(Parts):
    """The parts of a usable row and its number."""

    row: int = -1

    @classmethod
    def of(cls, parts: Parts, row: int, **changed: Any) -> Example:
        """The parts of row number `row`, with what is to be changed."""
        return cls(**{**vars(parts), "row": row, **changed})


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason it is counted under."""


# ---- reading a column ----


def number_of(row: Row, column: str) -> float:
    """The number in a column, also as CSV writes it. Raises BadRow where there is none."""
    value = row.get(column)
    if value is None:
        raise BadRow(f"no {column}")
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if math.isnan(number):
        raise BadRow(f"{column} is not a number")
    return number


def shared_prefix(first: Text, second: Text) -> int:
    """How many characters, or messages, two texts have in common at their beginning."""
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


# ---- completions ----


def sides(completions: tuple[Text, ...]) -> tuple[str, ...]:
    """What each of an example's completions is called."""
    return ("chosen", "rejected") if len(completions) == 2 else ("completion",)


def check_completions(completions: tuple[Text, ...]) -> None:
    """Raise BadRow for completions that cannot be trained on: empty, identical, or not one message of the assistant."""
    for side, completion in zip(sides(completions), completions, strict=True):
        if isinstance(completion, list) and len(completion) > 1:
            raise BadRow(f"{side} is more than one message")
        if isinstance(completion, list) and completion and completion[0]["role"] != "assistant":
            raise BadRow(f"{side} is not the assistant's")
        if isinstance(completion, list) and any(map(_not_trained, completion)):
            raise BadRow(f"{side} is marked as not to be trained on")
        if not content(completion).strip() and not _says_more(completion):
            raise BadRow(f"{side} is empty")
    if len(completions) == 2 and _said(completions[0]) == _said(completions[1]):
        raise BadRow("identical completions")


def content(text: Text) -> str:
    """A string as it is; of messages, the contents one after the other."""
    return text if isinstance(text, str) else "".join(message.get("content") or "" for message in text)


def _not_trained(message: dict[str, Any]) -> bool:
    """Whether a message says so: `weight: 0` as in OpenAI's files, `train: false` (axolotl), `loss: false` (swift)."""
    weight = message.get("weight")
    return (weight is not None and weight == 0) or any(
        message.get(key) is False for key in ("train", "trainable", "loss")
    )


def _says_more(text: Text) -> bool:
    """Whether a completion calls a tool, which is an answer without content."""
    return isinstance(text, list) and any(message.get("tool_calls") for message in text)


def _said(text: Text) -> list[Any]:
    """What two completions are compared by."""
    messages = [] if isinstance(text, str) else text
    others = [{key: value for key, value in message.items() if key not in ("role", "content")} for message in messages]
    return [content(text), [other for other in others if other]]
