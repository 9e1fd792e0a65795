"""Row formats: one function each, which reads a row's prompt and answers. A new format is a function and a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from otpo.errors import UserError

Row = dict[str, Any]
Messages = list[dict[str, Any]]
Text = str | Messages


@dataclass(frozen=True)
class Parts:
    """What a row says: a prompt and its answers, (chosen, rejected) or (completion,); strings or lists of messages."""

    prompt: Text
    answers: tuple[Text, ...]
    label: bool | None = None


@dataclass(frozen=True)
class Example(Parts):
    """The parts of a usable row and its number."""

    row: int = -1


class BadRow(ValueError):
    """A row that cannot be used; the message is the reason it is counted under."""


def preference(row: Row) -> Parts:
    """`{prompt, chosen, rejected}`, strings or messages (TRL's explicit prompt).

    Where `prompt` is a string and the answers are conversations that repeat it, as in UltraFeedback binarized, the
    conversations' shared beginning is the prompt, as in TRL's `maybe_extract_prompt`.
    """
    prompt, chosen, rejected = (_text(row, column) for column in ("prompt", "chosen", "rejected"))
    if isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):
        if _shared_prefix(chosen, rejected):
            return preference_implicit(row)
        prompt = [{"role": "user", "content": prompt}]
    return Parts(prompt, (chosen, rejected))


def instruction(row: Row) -> Parts:
    """`{instruction, input, chosen, rejected}`: the prompt is the instruction, a blank line and the input if any."""
    prompt = str(_text(row, "instruction"))
    if row.get("input"):
        prompt += "\n\n" + str(_text(row, "input"))
    return Parts(prompt, (_text(row, "chosen"), _text(row, "rejected")))


def preference_implicit(row: Row) -> Parts:
    """`{chosen, rejected}` that both begin with the prompt: their shared beginning (TRL's `extract_prompt`).

    Unlike TRL's, the split never falls inside a word ("gre|en" against "gre|y"): it goes back to the word's beginning.
    """
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise BadRow("one answer is a string, the other a list of messages")
    if chosen == rejected:
        raise BadRow("identical answers")
    split = _shared_prefix(chosen, rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        while split and chosen[split - 1].isalnum():
            split -= 1
        if split and chosen[split - 1] == " ":  # the space belongs to the first word of the answer
            split -= 1
    return Parts(chosen[:split], (chosen[split:], rejected[split:]))


def unpaired(row: Row) -> Parts:
    """`{prompt, completion, label}`: one answer and whether it is a good one (KTO)."""
    label = row["label"]
    if isinstance(label, str):
        label = {"true": True, "1": True, "false": False, "0": False}.get(label.strip().lower())
    if label not in (True, False):
        raise BadRow("label is neither true nor false")
    return Parts(_text(row, "prompt"), (_text(row, "completion"),), bool(label))


def prompt_completion(row: Row) -> Parts:
    """`{prompt, completion}`: supervised training."""
    return Parts(_text(row, "prompt"), (_text(row, "completion"),))


@dataclass(frozen=True)
class Format:
    """A kind of row: the columns it is known by, and the function that reads it."""

    columns: tuple[str, ...]
    parts: Callable[[Row], Parts]
    pairs: bool


# The first whose columns most rows have is taken, so what needs more columns stands first.
FORMATS: dict[str, Format] = {
    "preference": Format(("prompt", "chosen", "rejected"), preference, pairs=True),
    "instruction": Format(("instruction", "chosen", "rejected"), instruction, pairs=True),
    "preference-implicit": Format(("chosen", "rejected"), preference_implicit, pairs=True),
    "unpaired": Format(("prompt", "completion", "label"), unpaired, pairs=False),
    "prompt-completion": Format(("prompt", "completion"), prompt_completion, pairs=False),
}


def recognise(rows: Sequence[Row]) -> str:
    """Name the format of the rows: the first of FORMATS whose columns at least half of the rows have.

    Raises:
        UserError: no format fits; says the columns found and the formats known.
    """
    for name, known in FORMATS.items():
        if 2 * sum(all(column in row for column in known.columns) for row in rows) >= max(len(rows), 1):
            return name
    columns = sorted({str(column) for row in rows for column in row})
    formats = "; ".join(f"{name}: {', '.join(known.columns)}" for name, known in FORMATS.items())
    raise UserError(f"no known format has the columns {', '.join(columns) or '(none)'}. Known formats: {formats}")


def _text(row: Row, column: str) -> Text:
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


def _shared_prefix(first: Text, second: Text) -> int:
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def check_answers(answers: tuple[Text, ...]) -> None:
    """Raise BadRow for answers that cannot be trained on: empty, identical, or not one message of the assistant."""
    for side, answer in zip(("chosen", "rejected") if len(answers) == 2 else ("completion",), answers, strict=True):
        if isinstance(answer, list) and len(answer) > 1:
            raise BadRow(f"{side} answer is more than one message")
        if isinstance(answer, list) and answer and answer[0]["role"] != "assistant":
            raise BadRow(f"{side} answer is not the assistant's")
        if not content(answer).strip():
            raise BadRow(f"empty {side} answer")
    if len(answers) == 2 and content(answers[0]) == content(answers[1]):
        raise BadRow("identical answers")


def content(text: Text) -> str:
    """A string as it is; of messages, the contents one after the other."""
    return text if isinstance(text, str) else "".join(message["content"] for message in text)
