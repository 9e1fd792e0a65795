"""What a row of a data file says, whatever its format: a prompt and its completions, still text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from otpo.files import Row

Messages = list[dict[str, Any]]
Text = str | Messages


@dataclass(frozen=True)
class Parts:
    """A prompt and its completions, (chosen, rejected) or (completion,); each a string or a list of messages.

    `notes` are remarks that the report counts; the row is used all the same.
    """

    prompt: Text
    completions: tuple[Text, ...]
    label: bool | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example(Parts):
    """The parts of a usable row and its number."""

    row: int = -1


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


def string_of(row: Row, column: str) -> str:
    """The string in a column. Raises BadRow where there is none."""
    value = row.get(column)
    if value is None:
        raise BadRow(f"no {column}")
    if not isinstance(value, str):
        raise BadRow(f"{column} is not a string")
    return value


def text_of(row: Row, column: str) -> Text:
    """The string or the messages in a column. Raises BadRow where there are none."""
    value = row.get(column)
    if value is None:
        raise BadRow(f"no {column}")
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise BadRow(f"{column} is neither a string nor a list of messages")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRow(f"{column} has a message without a role")
        if not isinstance(message.get("content"), str):
            raise BadRow(f"{column} has a message whose content is not text")
    # Parquet fills absent keys with None, and templates test for the key's presence.
    return [{key: item for key, item in message.items() if item is not None} for message in value]


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
        if not content(completion).strip():
            raise BadRow(f"{side} is empty")
    if len(completions) == 2 and content(completions[0]) == content(completions[1]):
        raise BadRow("identical completions")


def content(text: Text) -> str:
    """A string as it is; of messages, the contents one after the other."""
    return text if isinstance(text, str) else "".join(message["content"] for message in text)
