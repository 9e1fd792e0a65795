"""A question to the judge, and what came of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eval.judge.asking.identity import answers_as
from eval.judge.protocols.protocol import Protocol
from eval.judge.protocols.templates import Message
from eval.judge.replies import Reading
from eval.judge.store import StoredReply


@dataclass(frozen=True)
class Question:
    """The messages to send, the protocol by which the reply is read, and which of several samples it asks for."""

    messages: list[Message]
    protocol: Protocol
    sample: int = 0


@dataclass(frozen=True)
class Verdict:
    """What came of a question.

    Attributes:
        key: of the reply in the store; empty if the judge was not asked.
        value: a preference in [1, 2], a rating in [1, 10] or a score in [0, 100]; NaN exactly if there is an `error`.
        read: where the verdict was read: "logprobs", "json", "tool" or "text".
        said: the grade, or what was said of each criterion.
        weight: how often it counts in the score.
        model: what the endpoint calls the model that answered.
        error: the kind of failure (see `endpoint`), or None.
        detail: the endpoint's own words about the failure, or what the judge said in place of a verdict.
        raw: the body of the last reply, if any.
        attempts: calls made for it now; 0 if the reply was in the store.
        prompt_tokens: of all attempts, failed ones included.
        completion_tokens: of all attempts, failed ones included.
        seconds: duration of the call that succeeded.
        cached: whether the reply was in the store.
    """

    key: str
    value: float = math.nan
    error: str | None = None
    detail: str | None = None
    raw: str | None = None
    attempts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    cached: bool = False
    read: str | None = None
    said: str | None = None
    weight: float = 1.0
    model: str | None = None


def verdict_of(key: str, found: Reading, reply: StoredReply, attempts: int, *, cached: bool = False) -> Verdict:
    """What came of a question that has a readable reply."""
    return Verdict(
        key,
        found.value,
        raw=reply.response,
        attempts=attempts,
        prompt_tokens=reply.prompt_tokens,
        completion_tokens=reply.completion_tokens,
        seconds=reply.seconds,
        cached=cached,
        read=found.read,
        said=found.said,
        weight=found.weight,
        model=answers_as(reply.response),
    )
