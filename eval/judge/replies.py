"""Reads a verdict from the judge's reply.

A pairwise reply is read as AlpacaEval's weighted annotator reads it: `logprob_parser` with numerator "m" and
denominator {"m", "M"} (https://github.com/tatsu-lab/alpaca_eval). A rating is the expected value of the number. Grades
and criteria are read from the text alone (`reading.spoken`).

Logprobs count only where they are those of the answer: the text without its thinking says a verdict, the position is
the one whose token says it there, and the tokens of a verdict have at least `Protocol.least_mass` at it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from eval.judge.protocols.protocol import FIRST, SECOND, Protocol
from eval.judge.protocols.registry import PROTOCOLS
from eval.judge.reading.logprobs import Position, position_at, positions_of, weights_of
from eval.judge.reading.spoken import bracketed_rating, read_criteria, score_of, spoken_grade
from eval.judge.reading.text import letter_of, spoken_verdict, strip_thinking, without_raw_spaces

_NUMBER = re.compile(r"\D{0,20}?(?P<number>10|[1-9])(?:\s*/\s*10)?\D{0,20}", re.DOTALL)
_NUMBERS = {str(number): number for number in range(1, 11)}


class UnreadableError(Exception):
    """A reply that holds no verdict; `kind` is "no_logprobs", "unparsable", "cut_off", "refused" or "malformed".

    `said` is what the judge said in its place.
    """

    def __init__(self, kind: str, said: str = ""):
        super().__init__(kind)
        self.kind, self.said = kind, said[:300]


@dataclass(frozen=True)
class Reading:
    """A verdict.

    Attributes:
        value: a preference in [1, 2], a rating in [1, 10], or by criteria a score in [0, 100].
        read: where it was read: "logprobs", "json", "tool" or "text".
        said: the grade, or what was said of each criterion as JSON; None for other kinds of verdict.
        weight: how often it counts in the score.
    """

    value: float
    read: str
    said: str | None = None
    weight: float = 1.0


def read_reply(protocol: Protocol, reply: str, allow_text: bool) -> Reading:
    """The verdict in a reply, as the protocol says.

    Args:
        protocol: what the judge was asked for.
        reply: the body of the HTTP reply.
        allow_text: read the verdict from the text if the logprobs hold none.

    Raises:
        UnreadableError: there is no verdict in it.
    """
    try:
        response = json.loads(reply)
    except (ValueError, RecursionError):
        raise UnreadableError("malformed") from None
    if protocol.verdict in ("grades", "criteria"):
        return _read_said(response, protocol)
    read = read_pair if protocol.verdict == "pair" else read_rating
    try:
        return Reading(read(response, False, protocol), "logprobs")
    except UnreadableError:
        if not allow_text:
            raise
    return Reading(read(response, True, protocol), _where(_choice(response)))


def _read_said(response: dict[str, Any], protocol: Protocol) -> Reading:
    choice = _choice(response)
    text = _text(choice)
    if protocol.verdict == "grades":
        grade = spoken_grade(text, protocol.grades)
        if grade and _goes_on(choice, text):
            raise UnreadableError("cut_off", text)
        if grade:
            return Reading(grade.preference, _where(choice), grade.said, grade.weight)
    elif values := read_criteria(text, protocol.criteria):
        said = json.dumps(values, ensure_ascii=False)
        return Reading(score_of(values, protocol.criteria), _where(choice), said)
    raise _unreadable(choice, text, [])


def _where(choice: dict[str, Any]) -> str:
    """Where a verdict that was not read from logprobs stands."""
    if _called(choice):
        return "tool"
    return "json" if re.match(r"(?:```(?:json)?\s*)?\{", _text(choice)) else "text"


def read_usage(reply: str) -> tuple[int, int]:
    """(prompt, completion) tokens that a reply reports; 0 if it reports none."""
    try:
        usage = json.loads(reply)["usage"]
        said = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
        prompt, completion = (count if 0 <= count < 2**48 else 0 for count in said)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return 0, 0
    return prompt, completion


def words_of(raw: str) -> list[str]:
    """What the judge wrote in what a row of verdicts keeps of its replies: their texts, without thinking.

    Args:
        raw: the body of a reply; or JSON with several of them, as of samples or of two outputs seen one at a time.
            Other JSON, such as scores or the preferences of a panel, has no words.
    """
    try:
        found = json.loads(raw)
    except ValueError:
        return []
    if isinstance(found, dict) and "choices" in found:
        try:
            return [_text(_choice(found))]
        except UnreadableError:
            return []
    several = found.values() if isinstance(found, dict) else found if isinstance(found, list) else []
    return [text for each in several if isinstance(each, str) for text in words_of(each)]


def read_pair(
    response: dict[str, Any], allow_text: bool = False, protocol: Protocol = PROTOCOLS["preference"]
) -> float:
    """The preference in a pairwise reply: 1 if the output shown first is certainly better, 2 if the second is.

    It is `2 - p(m) / (p(m) + p(M))`, with the probabilities in the `top_logprobs` of the position that gives the
    answer; a token that is not listed has probability 0 (AlpacaEval's `logprob_parser`).

    Args:
        response: a chat completion.
        allow_text: where the logprobs are not those of a verdict, take the one that the text says as 1 or 2.
        protocol: how much probability the verdict's tokens must have.

    Raises:
        UnreadableError: no_logprobs, unparsable, cut_off, refused or malformed.
    """
    choice = _choice(response)
    text, positions = _text(choice), positions_of(choice)
    spoken = spoken_verdict(text, cut=_is_cut(choice))
    if spoken is None and _is_cut(choice) and spoken_verdict(text):
        raise UnreadableError("cut_off", text)
    position = position_at(positions, text, spoken.at) if positions and spoken else None
    if position is not None and spoken is not None and letter_of(position.token) != spoken.letter:
        position = None
    if positions and len(positions) == 1 and not spoken and protocol.bare:
        position = positions[0]
    if position is not None:
        weights = weights_of(position, letter_of, {FIRST: FIRST, SECOND: SECOND}, bare_only=protocol.bare)
        total = sum(weights.values())
        agrees = protocol.bare or (spoken is not None and weights.get(spoken.letter))
        if agrees and total >= protocol.least_mass:
            return 2.0 - weights.get(FIRST, 0.0) / total
    if allow_text and spoken:
        return 1.0 if spoken.letter == FIRST else 2.0
    raise _unreadable(choice, text, positions)


def read_rating(response: dict[str, Any], allow_text: bool = False, protocol: Protocol = PROTOCOLS["rating"]) -> float:
    """The rating in a reply: the expected value of the numbers 1 to 10 at the position that gives the answer.

    Args:
        response: a chat completion.
        allow_text: where the logprobs are not those of a number, read it from the text.
        protocol: how much probability the numbers must have.

    Raises:
        UnreadableError: no_logprobs, unparsable, cut_off, refused or malformed.
    """
    choice = _choice(response)
    text, positions = _text(choice), positions_of(choice)
    number = _NUMBER.fullmatch(text)
    position = position_at(positions, text, number.start("number")) if positions and number else None
    if position is not None and number is not None:
        # A tokenizer that splits "10" makes "1" the first token; the text then tells the number.
        if number["number"] == "10" and _number(position.token) == 1:
            return 10.0
        weights = weights_of(position, _number, _NUMBERS)
        total = sum(weights.values())
        if total >= protocol.least_mass and _number(position.token) == int(number["number"]):
            return sum(value * weight for value, weight in weights.items()) / total
    if allow_text:
        said = float(number["number"]) if number else bracketed_rating(text)
        if said is not None and _goes_on(choice, text):
            raise UnreadableError("cut_off", text)
        if said is not None:
            return said
    raise _unreadable(choice, text, positions)


def _number(token: str) -> int | None:
    return _NUMBERS.get(without_raw_spaces(token).strip(" \t\n*"))


def _choice(response: dict[str, Any]) -> dict[str, Any]:
    choices = response.get("choices") if isinstance(response, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise UnreadableError("malformed")
    error = choices[0].get("error")
    if error or choices[0].get("finish_reason") == "error":  # a gateway's, whose upstream broke off
        raise UnreadableError("malformed", f"an error inside a reply: {json.dumps(error)}")
    return choices[0]


def _content(choice: dict[str, Any]) -> str:
    message = choice.get("message")
    if called := _called(choice):
        return called
    content = message.get("content") if isinstance(message, dict) else choice.get("text")
    if isinstance(content, list):  # parts, as of a message to the model
        content = "".join(part["text"] for part in content if isinstance(part, dict) and _is_text(part))
    return content if isinstance(content, str) else ""


def _is_cut(choice: dict[str, Any]) -> bool:
    """Whether a reply ended before its end, by the endpoint's own account."""
    return str(choice.get("finish_reason")).lower() in ("length", "max_tokens", "model_length", "content_filter")


def _goes_on(choice: dict[str, Any], text: str) -> bool:
    """Whether a reply was cut after what stands in double brackets, so that the last of these may be to come."""
    return _is_cut(choice) and "[[" in text and not text.rstrip("*_ .`\n").endswith("]]")


def _called(choice: dict[str, Any]) -> str | None:
    """The arguments of the one tool that a reply calls, as JSON; None where it calls none, or several."""
    message = choice.get("message")
    calls = message.get("tool_calls") if isinstance(message, dict) else None
    if not isinstance(calls, list) or len(calls) != 1 or not isinstance(calls[0], dict):
        return None
    function = calls[0].get("function")
    arguments = function.get("arguments") if isinstance(function, dict) else None
    return json.dumps(arguments) if isinstance(arguments, dict) else arguments if isinstance(arguments, str) else None


def _is_text(part: dict[str, Any]) -> bool:
    return part.get("type") in (None, "text", "output_text") and isinstance(part.get("text"), str)


def _text(choice: dict[str, Any]) -> str:
    return strip_thinking(without_raw_spaces(_content(choice)))


def _unreadable(choice: dict[str, Any], text: str, positions: list[Position] | None) -> UnreadableError:
    message = choice.get("message")
    refusal = message.get("refusal") if isinstance(message, dict) else None
    if choice.get("finish_reason") == "content_filter" or refusal:
        return UnreadableError("refused", str(refusal or text))
    if not text and choice.get("finish_reason") == "length":
        return UnreadableError("cut_off", _content(choice))
    return UnreadableError("no_logprobs" if positions is None else "unparsable", text or _content(choice))
