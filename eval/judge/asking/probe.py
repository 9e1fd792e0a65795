"""Finds out by a few calls how a judge can be asked: one question with a clear answer, in one way after another."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import replace

from eval.judge.asking.ways import LEAST_TOKENS, THINKING_TOKENS, Way, first_way
from eval.judge.config import JudgeConfig
from eval.judge.endpoint import Failure
from eval.judge.protocols.protocol import Protocol, Read
from eval.judge.replies import UnreadableError, read_reply
from otpo.errors import UserError

MOST_CALLS = 12
QUESTION = ("What is the capital of France?", "The capital of France is Paris.", "I do not like questions.")

Ask = Callable[[Way], Awaitable[str | Failure | None]]
"""Asks the question in a way: the reply, the failure, or None where failures that may pass did not."""


async def find_way(ask: Ask, config: JudgeConfig, protocol: Protocol) -> Way:
    """The first way in which the judge gives a verdict. Where nothing can be told, the one that is tried first.

    Raises:
        UserError: the endpoint refuses what it is sent, or gives no verdict in any way; with its own words.
    """
    way = first_way(config, protocol)
    tried: list[Way] = []
    while len(tried) < MOST_CALLS:
        tried.append(way)
        reply = await ask(way)
        if reply is None:
            return first_way(config, protocol)
        if isinstance(reply, Failure):
            changed = _adapted(way, reply, config, protocol)
            if changed is None or changed in tried:
                if _names_a_setting(reply) or changed:
                    raise UserError(
                        f"The judge at {config.url} refuses a setting of the request ({reply}). Change "
                        "judge.temperature, judge.max_tokens, judge.verdict or judge.extra_body, or use another judge."
                    )
                return way
            way = changed
            continue
        try:
            found = read_reply(protocol, reply, allow_text=way.read != "logprobs" or config.allow_text_verdict)
            if way.read not in ("json", "tool") or found.read == way.read or not _allowed("text", config, protocol):
                return way
            way = _reading("text", way, config)  # the schema was ignored
        except UnreadableError as unreadable:
            if unreadable.kind == "refused":
                return way
            further = _further(way, unreadable, reply, config, protocol)
            if further is None or further in tried:
                raise UserError(_no_verdict(config, way, unreadable)) from None
            way = further
    return first_way(config, protocol)


def _further(way: Way, unreadable: UnreadableError, reply: str, config: JudgeConfig, protocol: Protocol) -> Way | None:
    """The next way after a reply without a verdict."""
    cut_off, following = unreadable.kind == "cut_off", _after(way.read, config, protocol)
    if way.read == "logprobs":
        if cut_off and way.max_tokens is None:
            return _with_tokens(way, config, THINKING_TOKENS)
        if following is None:
            return None
        try:  # a judge without logprobs that says its verdict and nothing else needs no more than that
            read_reply(protocol, reply, allow_text=True)
            return replace(way, read="text")
        except UnreadableError:
            return _reading(following, way, config)
    if way.read != "text" and not cut_off and following:
        return _reading(following, way, config)
    if (way.max_tokens or 0) < THINKING_TOKENS:
        return _with_tokens(way, config, THINKING_TOKENS)
    return _reading(following, way, config) if following else None


def _allowed(read: Read, config: JudgeConfig, protocol: Protocol) -> bool:
    return config.verdict in ("auto", read) and read in protocol.reads


def _after(read: Read, config: JudgeConfig, protocol: Protocol) -> Read | None:
    """Where else verdicts could be read, after this."""
    later = protocol.reads[protocol.reads.index(read) + 1 :]
    return next((each for each in later if _allowed(each, config, protocol)), None)


def _reading(read: Read, way: Way, config: JudgeConfig) -> Way:
    return _with_tokens(replace(way, read=read), config, max(way.max_tokens or 0, LEAST_TOKENS[read]))


def _with_tokens(way: Way, config: JudgeConfig, tokens: int) -> Way:
    return way if config.max_tokens else replace(way, max_tokens=tokens)


def _names_a_setting(failure: Failure) -> bool:
    names = r"logprobs|max_(?:completion_|output_)?tokens|temperature|response_format|\b(?:system\b|stream|tool|seed)"
    names += "|reasoning"
    return failure.kind == "bad_request" and bool(re.search(names, failure.detail, re.IGNORECASE))


def _adapted(way: Way, failure: Failure, config: JudgeConfig, protocol: Protocol) -> Way | None:
    """The way without what the endpoint refuses; None where it does not say, or it is something else."""
    if failure.kind != "bad_request":
        return None
    said, following = failure.detail.lower(), _after(way.read, config, protocol)
    numbers = [int(number) for number in re.findall(r"(?<![\w.])\d{1,6}(?![\w.]*\w)", said.removeprefix("http 400"))]
    if "max_completion_tokens" in said and way.tokens_field == "max_tokens":
        return replace(way, tokens_field="max_completion_tokens")
    if re.search(r"max_(?:completion_|output_)?tokens|output tokens", said) and not config.max_tokens:
        if re.search(r"at least|minimum|below|greater|larger|>=", said) and numbers:
            return replace(way, max_tokens=max(*numbers, 16) if len(numbers) > 1 else max(numbers[0], 16))
        if re.search(r"at most|maximum|less|smaller|exceed|too large|<=", said) and way.max_tokens:
            return replace(way, max_tokens=min([n for n in numbers if n < way.max_tokens], default=way.max_tokens // 2))
    if config.reasoning_effort and "reasoning" in said and way.reasoning:
        return replace(way, reasoning=False)
    if config.sampling_seed is not None and re.search(r"\bseed\b", said) and way.seed:
        return replace(way, seed=False)
    if "temperature" in said and way.temperature:
        return replace(way, temperature=False)
    if "logprobs" in said and way.read == "logprobs":
        fewer = [n for n in numbers if 2 <= n < (way.top_logprobs or 99)]
        if "top_logprobs" in said and fewer and way.top_logprobs is None:
            return replace(way, top_logprobs=max(fewer))
        return _reading(following, way, config) if following else None
    refused = {"json": r"response_format|json.?schema|structured|guided", "tool": r"\btools?\b|tool_choice|function"}
    if way.read in refused and re.search(refused[way.read], said):
        return _reading(following, way, config) if following else None
    if "system" in said and way.system:
        return replace(way, system=False)
    return replace(way, stream=True) if "stream" in said and not way.stream else None


def _no_verdict(config: JudgeConfig, way: Way, unreadable: UnreadableError) -> str:
    said = f"it said {unreadable.said[:200]!r}" if unreadable.said.strip() else "its reply was empty"
    todo = {
        "cut_off": "Its thinking did not end within the limit: raise judge.max_tokens, or turn thinking off by "
        "judge.extra_body.",
        "no_logprobs": "It gives no logprobs: set judge.verdict to auto, json, tool or text.",
    }.get(unreadable.kind, "Use another judge, or another protocol.")
    return (
        f"The judge {config.model} at {config.url} answers, but gives no verdict ({unreadable.kind}; {way}): to a "
        f"question with a clear answer {said}. {todo}"
    )
