"""Reads a verdict from the judge's reply.

A pairwise reply is read as AlpacaEval's weighted annotator reads it: `logprob_parser` with numerator "m" and
denominator {"m", "M"} (https://github.com/tatsu-lab/alpaca_eval). A rating is the expected value of the number.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from eval.judge.protocols import FIRST, SECOND, Protocol

_THINKING = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_THINKING_END = re.compile(r"^.*</(?:think|thinking|reasoning)>", re.DOTALL | re.IGNORECASE)


class UnreadableError(Exception):
    """A reply that holds no verdict; `kind` is "no_logprobs", "unparsable", "refused" or "malformed"."""

    def __init__(self, kind: str):
        super().__init__(kind)
        self.kind = kind


def read_verdict(protocol: Protocol, reply: str, allow_text: bool) -> float:
    """The verdict in a reply: a preference in [1, 2] or a rating in [1, 10], as the protocol says.

    Args:
        protocol: what the judge was asked for.
        reply: the body of the HTTP reply.
        allow_text: read the verdict from the text if the logprobs hold none.

    Raises:
        UnreadableError: there is no verdict in it.
    """
    try:
        response = json.loads(reply)
    except ValueError:
        raise UnreadableError("malformed") from None
    return (read_pair if protocol.verdict == "pair" else read_rating)(response, allow_text)


def read_usage(reply: str) -> tuple[int, int]:
    """(prompt, completion) tokens that a reply reports; 0 if it reports none."""
    try:
        usage = json.loads(reply)["usage"]
        return int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
    except (ValueError, KeyError, TypeError, AttributeError):
        return 0, 0


def read_pair(response: dict[str, Any], allow_text: bool = False) -> float:
    """The preference in a pairwise reply: 1 if the output shown first is certainly better, 2 if the second is.

    It is `2 - p(m) / (p(m) + p(M))`, with the probabilities of exactly these tokens in the first position's
    `top_logprobs`; a token that is not listed has probability 0 (AlpacaEval's `logprob_parser`).

    Args:
        response: a chat completion.
        allow_text: if the logprobs hold no verdict, read a reply that is just "m" or "M" as 1 or 2.

    Raises:
        UnreadableError: no_logprobs, unparsable, refused or malformed.
    """
    choice = _choice(response)
    top = _first_logprobs(choice)
    logprobs = {token: value for token, value in top or () if token in (FIRST, SECOND)}
    if logprobs:
        first, second = logprobs.get(FIRST, -math.inf), logprobs.get(SECOND, -math.inf)
        peak = max(first, second)
        total = peak + math.log(math.exp(first - peak) + math.exp(second - peak))
        return 2.0 - math.exp(first - total)
    if allow_text:
        verdict = _text(choice).strip(" \t\n\"'`*.")
        if verdict in (FIRST, SECOND):
            return 1.0 if verdict == FIRST else 2.0
    raise UnreadableError(_why_not(choice, top))


def read_rating(response: dict[str, Any], allow_text: bool = False) -> float:
    """The rating in a reply: the expected value of the numbers 1 to 10 in the first position's `top_logprobs`.

    Args:
        response: a chat completion.
        allow_text: if the logprobs hold no number, read it from the text.

    Raises:
        UnreadableError: no_logprobs, unparsable, refused or malformed.
    """
    choice = _choice(response)
    top = _first_logprobs(choice)
    number = re.fullmatch(r"\D{0,20}?(10|[1-9])(?:\s*/\s*10)?\D{0,20}", _text(choice))
    emitted = _first_token(choice)
    # A tokenizer that splits "10" makes "1" the first token; the text then tells the number.
    if number and number[1] == "10" and emitted is not None and emitted.strip() == "1":
        return 10.0
    weights = {value: math.exp(logprob) for token, logprob in top or () if (value := _score(token)) is not None}
    total = sum(weights.values())
    if total > 0:
        return sum(value * weight for value, weight in weights.items()) / total
    if allow_text and number:
        return float(number[1])
    raise UnreadableError(_why_not(choice, top))


def strip_thinking(text: str) -> str:
    """A reply without its thinking blocks. Everything after a block that never ends is dropped too."""
    text = _THINKING_END.sub("", _THINKING.sub("", text))
    return re.split(r"<(?:think|thinking|reasoning)>", text, maxsplit=1, flags=re.IGNORECASE)[0].strip()


def _score(token: str) -> int | None:
    token = token.strip()
    return int(token) if re.fullmatch(r"10|[1-9]", token) else None


def _choice(response: dict[str, Any]) -> dict[str, Any]:
    choices = response.get("choices") if isinstance(response, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise UnreadableError("malformed")
    return choices[0]


def _text(choice: dict[str, Any]) -> str:
    message = choice.get("message")
    content = message.get("content") if isinstance(message, dict) else None
    return strip_thinking(content) if isinstance(content, str) else ""


def _first_position(choice: dict[str, Any]) -> dict[str, Any] | None:
    logprobs = choice.get("logprobs")
    positions = logprobs.get("content") if isinstance(logprobs, dict) else None
    return positions[0] if isinstance(positions, list) and positions and isinstance(positions[0], dict) else None


def _first_token(choice: dict[str, Any]) -> str | None:
    token = (_first_position(choice) or {}).get("token")
    return token if isinstance(token, str) else None


def _first_logprobs(choice: dict[str, Any]) -> list[tuple[str, float]] | None:
    """(token, log-probability) of the first position's `top_logprobs`; None if the reply has none."""
    top = (_first_position(choice) or {}).get("top_logprobs")
    if not isinstance(top, list) or not top:
        return None
    pairs = [(item.get("token"), item.get("logprob")) for item in top if isinstance(item, dict)]
    return [(t, float(p)) for t, p in pairs if isinstance(t, str) and isinstance(p, (int, float)) and not math.isnan(p)]


def _why_not(choice: dict[str, Any], top: list | None) -> str:
    message = choice.get("message")
    if choice.get("finish_reason") == "content_filter" or (isinstance(message, dict) and message.get("refusal")):
        return "refused"
    return "no_logprobs" if top is None else "unparsable"
