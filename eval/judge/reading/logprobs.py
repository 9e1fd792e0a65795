"""The probabilities of the tokens that a verdict could have been, at the position where the reply gives it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from eval.judge.reading.text import without_raw_spaces

T = TypeVar("T")

_ENDS = re.compile(r"\s*<[^<>]*>\s*")  # the token that ends a reply, which some servers list too


@dataclass(frozen=True)
class Position:
    """One position of a reply: the token that was sampled, and token -> log-probability of those that are listed."""

    token: str
    top: dict[str, float]


def positions_of(choice: Mapping[str, Any]) -> list[Position] | None:
    """The positions that a chat completion's choice gives logprobs for; None if it has none.

    OpenAI's shape is `logprobs.content`; older servers give lists side by side (`tokens`, `top_logprobs`). A value that
    is no log-probability is left out.
    """
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, Mapping):
        return None
    content, legacy = logprobs.get("content"), logprobs.get("top_logprobs")
    if isinstance(content, list) and content:
        found = [_position(each) for each in content]
    elif isinstance(legacy, list) and legacy:
        tokens = logprobs.get("tokens")
        tokens = tokens if isinstance(tokens, list) and len(tokens) == len(legacy) else [None] * len(legacy)
        listed = zip(tokens, legacy, strict=True)
        found = [Position(token if isinstance(token, str) else "", _top(top)) for token, top in listed]
    else:
        return None
    return found if any(position.top for position in found) else None


def _position(value: Any) -> Position:
    if not isinstance(value, Mapping):
        return Position("", {})
    token = value.get("token")
    return Position(token if isinstance(token, str) else "", _top(value.get("top_logprobs")))


def _top(listed: Any) -> dict[str, float]:
    if isinstance(listed, Mapping):
        pairs = list(listed.items())
    elif isinstance(listed, list):
        pairs = [(each.get("token"), each.get("logprob")) for each in listed if isinstance(each, Mapping)]
    else:
        return {}
    top: dict[str, float] = {}
    for token, value in pairs:
        if isinstance(token, str) and isinstance(value, int | float) and not isinstance(value, bool):
            # A server's rounding may leave a log-probability just above 0.
            if math.isfinite(value) and value < 1e-3:
                top.setdefault(token, min(float(value), 0.0))
    return top


def position_at(positions: list[Position], text: str, at: int) -> Position | None:
    """The position whose token holds the character `at` of a text that the reply ends in.

    The positions may end before the text does. None where their tokens do not spell the text: then they are those of
    something else, such as the thinking.
    """
    spelled = [without_raw_spaces(position.token) for position in positions]
    while spelled and _ENDS.fullmatch(spelled[-1]) and not text.endswith(spelled[-1]):
        spelled.pop()  # the text does not have it, and "<|im_end|>" has an m
    whole = "".join(spelled)
    start = whole.rfind(text)
    if start < 0:
        begun = whole.lstrip()
        if not begun or not text.startswith(begun):
            return None
        start = len(whole) - len(begun)
    end = 0
    for position, token in zip(positions, spelled, strict=False):
        end += len(token)
        if start + at < end:
            return position
    return None


def weights_of(
    position: Position, reads: Callable[[str], T | None], exact: Mapping[str, T], *, bare_only: bool = False
) -> dict[T, float]:
    """What the tokens of a position say -> the probability of all tokens that say it.

    Args:
        reads: what a token says, however it is spelled (" m", "M."); None for one that says nothing.
        exact: the bare tokens. Where they have half of the probability, no other spelling counts, as in alpaca_eval.
        bare_only: whether other spellings never count.
    """
    bare: dict[T, float] = {}
    spelled: dict[T, float] = {}
    for token, logprob in position.top.items():
        if token in exact:
            bare[exact[token]] = bare.get(exact[token], 0.0) + math.exp(logprob)
        said = reads(token)
        if said is not None:
            spelled[said] = spelled.get(said, 0.0) + math.exp(logprob)
    return bare if bare_only or sum(bare.values()) >= 0.5 else spelled
