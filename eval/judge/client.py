"""Asking many questions: so many at once, retried by one policy, stored as they are answered, within a budget."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eval.judge.config import JudgeConfig
from eval.judge.endpoint import FATAL, RETRIED, Endpoint, Failure, advice, open_endpoint
from eval.judge.protocols import Message, Protocol, UnreadableError, read_pair, read_rating
from eval.judge.store import Store, Stored, request_key
from otpo.errors import UserError, WorkError

BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS, LONGEST_RETRY_AFTER_SECONDS = 0.25, 30.0, 600.0

Progress = Callable[[int, int, int], None]
"""Called with (done, total, failures)."""


@dataclass(frozen=True)
class Question:
    """What is asked, and the protocol that reads the reply."""

    messages: list[Message]
    protocol: Protocol


@dataclass(frozen=True)
class Answer:
    """A question's result: `value` is NaN if and only if `error` has a type. Tokens include failed attempts."""

    key: str
    value: float = math.nan
    error: str | None = None
    raw: str | None = None
    attempts: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    cached: bool = False


def parameters(protocol: Protocol, config: JudgeConfig) -> dict[str, Any]:
    """The request's fields beside model and messages; part of the key of a stored reply."""
    fields = {
        "max_tokens": config.max_tokens or protocol.max_tokens,
        "temperature": config.temperature,
        "logprobs": True,
        "top_logprobs": protocol.top_logprobs,
        **config.extra_body,
    }
    return {name: value for name, value in fields.items() if value is not None}


def read(question: Question, raw: str, allow_text: bool) -> float:
    """The value in a reply. Raises `UnreadableError`."""
    try:
        response = json.loads(raw)
    except ValueError:
        raise UnreadableError("malformed") from None
    return (read_pair if question.protocol.verdict == "pair" else read_rating)(response, allow_text)


def usage(raw: str) -> tuple[int, int]:
    """(prompt, completion) tokens that a reply says it used; 0 where it does not say."""
    try:
        said = json.loads(raw)["usage"]
        return int(said.get("prompt_tokens") or 0), int(said.get("completion_tokens") or 0)
    except (ValueError, KeyError, TypeError, AttributeError):
        return 0, 0


def price(config: JudgeConfig, prompt_tokens: float, completion_tokens: float) -> float:
    """USD."""
    return (prompt_tokens * config.price_input + completion_tokens * config.price_output) / 1e6


class Budget:
    """Lets a call start only if what is spent, what is in flight and the call itself stay within the budget."""

    def __init__(self, config: JudgeConfig, spent: float):
        self._config, self._changed = config, asyncio.Condition()
        self._spent, self._reserved, self._exhausted = spent, 0.0, False
        self._tokens_per_byte = 0.0  # the most that any reply has reported

    async def reserve(self, size: int, max_tokens: int) -> float | None:
        """The USD set aside for a call whose messages have `size` bytes, None where it would exceed the budget."""
        if self._config.budget_usd is None:
            return 0.0
        async with self._changed:
            while not self._exhausted:
                # Before the first reply: half a token a byte, about twice what English text has.
                estimate = price(self._config, size * (self._tokens_per_byte or 0.5), max_tokens)
                if self._spent + self._reserved + estimate <= self._config.budget_usd:
                    self._reserved += estimate
                    return estimate
                if not self._reserved:  # nothing in flight could turn out cheaper
                    self._exhausted = True
                    self._changed.notify_all()
                else:
                    await self._changed.wait()
        return None

    async def settle(self, reserved: float, size: int, tokens: tuple[int, int]) -> None:
        """Replace what was set aside by what the call cost."""
        self._spent += price(self._config, *tokens)
        self._tokens_per_byte = max(self._tokens_per_byte, tokens[0] / max(size, 1))
        if self._config.budget_usd is not None:
            async with self._changed:
                self._reserved -= reserved
                if self._reserved < 1e-12:
                    self._reserved = 0.0
                self._changed.notify_all()


class Run:
    """One run over many questions: the retry policy, the store and the reasons to stop early."""

    def __init__(self, endpoint: Endpoint, config: JudgeConfig, store: Store, spent: float):
        self._endpoint, self._config, self._store = endpoint, config, store
        self._budget = Budget(config, spent)
        self._stop = asyncio.Event()
        self._next_start = 0.0
        self._failed_in_a_row = 0
        self._given_up: str | None = None
        self._with_logprobs, self._without_logprobs = 0, 0

    def stop(self) -> None:
        """Start no further call; those in flight are finished and stored."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Whether no further call will start."""
        return self._stop.is_set()

    async def ask(self, question: Question, key: str) -> Answer:
        """Ask until there is a verdict or no hope of one.

        Raises:
            Failure: of a kind in FATAL, or "stopped" where the run was stopped meanwhile.
        """
        config, attempts, tokens = self._config, 0, [0, 0]
        body = {"model": config.model, "messages": question.messages, **parameters(question.protocol, config)}
        size = sum(len(message["content"].encode("utf-8", "surrogatepass")) + 16 for message in question.messages)

        def result(error: str | None, value: float = math.nan, raw: str | None = None, seconds: float = 0.0) -> Answer:
            return Answer(key, value, error, raw, attempts, tokens[0], tokens[1], seconds)

        while True:
            if self._given_up:
                return result(self._given_up)
            reserved = await self._budget.reserve(size, config.max_tokens or question.protocol.max_tokens)
            if reserved is None:
                return result("budget")
            await self._wait_for_turn()
            if self.stopped:
                await self._budget.settle(reserved, size, (0, 0))
                raise Failure("stopped")
            attempts += 1
            started, used, raw = time.perf_counter(), (0, 0), None
            try:
                raw = await self._endpoint.complete(body)
                used = usage(raw)
                value = self._read(question, raw, last=attempts > config.max_retries)
            except Failure as failure:
                error = failure
            except UnreadableError as unreadable:
                error = Failure(unreadable.kind)
            else:
                tokens[0] += used[0]
                tokens[1] += used[1]
                seconds = time.perf_counter() - started
                self._store.put(key, str(config.model), Stored(raw, tokens[0], tokens[1], seconds))
                self._failed_in_a_row = 0
                return result(None, value, raw, seconds)
            finally:
                await self._budget.settle(reserved, size, used)
            tokens[0] += used[0]
            tokens[1] += used[1]
            if error.kind in FATAL:
                raise error
            if error.kind not in RETRIED:
                self._failed_in_a_row = 0
                return result(error.kind, raw=raw)
            if attempts > config.max_retries or (error.retry_after or 0) > LONGEST_RETRY_AFTER_SECONDS:
                self._count_failure(error.kind)
                return result(error.kind, raw=raw)
            await self._pause(attempts, error.retry_after)

    def _read(self, question: Question, raw: str, last: bool) -> float:
        """A reply without logprobs is asked again; its text counts only at last, and only where that is allowed."""
        allow = self._config.allow_text_verdict or question.protocol.verdict == "rating"
        try:
            value = read(question, raw, allow_text=False)
        except UnreadableError as unreadable:
            if unreadable.kind == "no_logprobs":
                self._without_logprobs += 1
                # An endpoint that has never given any does not give any: asking again only costs.
                last = last or (self._without_logprobs >= 10 and not self._with_logprobs)
            if not allow or (unreadable.kind == "no_logprobs" and not last):
                raise
            return read(question, raw, allow_text=True)
        self._with_logprobs += 1
        return value

    def _count_failure(self, kind: str) -> None:
        """Give up on an endpoint that failed as many questions in a row, retries spent, as are asked at once."""
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= max(self._config.concurrency, 8):
            self._given_up = kind

    async def _wait_for_turn(self) -> None:
        if self._config.max_requests_per_minute is None:
            return
        now = time.monotonic()
        start = max(now, self._next_start)
        self._next_start = start + 60 / self._config.max_requests_per_minute
        await self._sleep(start - now)

    async def _pause(self, attempts: int, asked: float | None) -> None:
        backoff = min(LONGEST_BACKOFF_SECONDS, BACKOFF_SECONDS * 2 ** (attempts - 1)) * random.uniform(0.5, 1.0)
        await self._sleep(backoff if asked is None else asked + random.uniform(0, 0.1) * min(backoff, asked))

    async def _sleep(self, seconds: float) -> None:
        """Sleep, but not past a stop."""
        if seconds > 0:
            try:
                await asyncio.wait_for(self._stop.wait(), seconds)
            except TimeoutError:
                pass


def ask_all(
    questions: list[Question],
    config: JudgeConfig,
    store: Store,
    progress: Progress | None = None,
    spent_usd: float = 0.0,
) -> list[Answer]:
    """The answers to all questions, in their order. What was answered before, here or in an earlier run, is not asked.

    Ctrl-C starts no further call, waits for those in flight (at most `config.timeout`) and stores them.

    Raises:
        UserError: wrong settings, or key or model refused before anything was stored.
        WorkError: key or model refused in the middle.
    """
    keys = [request_key(str(config.model), q.messages, parameters(q.protocol, config)) for q in questions]
    rows, unanswered = Counter(keys), dict(zip(keys, questions, strict=True))
    answers: dict[str, Answer] = {}
    done = failures = 0

    def finished(answer: Answer) -> None:
        nonlocal done, failures
        answers[answer.key] = answer
        done += rows[answer.key]
        failures += rows[answer.key] if answer.error else 0
        if progress:
            progress(done, len(questions), failures)

    for key, question in list(unanswered.items()):
        stored = store.get(key)
        if stored is not None and (answer := _from_store(key, stored, question, config)):
            del unanswered[key]
            finished(answer)
    if unanswered:
        asyncio.run(_ask_new(list(unanswered.items()), config, store, finished, spent_usd))
    return [answers[key] for key in keys]


async def _ask_new(
    todo: list[tuple[str, Question]],
    config: JudgeConfig,
    store: Store,
    finished: Callable[[Answer], None],
    spent_usd: float,
) -> None:
    async with open_endpoint(config) as endpoint:
        run, queue = Run(endpoint, config, store, spent_usd), iter(todo)
        fatal: list[Failure] = []

        async def worker() -> None:
            for key, question in queue:
                if run.stopped:
                    return
                try:
                    finished(await run.ask(question, key))
                except Failure as failure:
                    if failure.kind != "stopped":
                        fatal.append(failure)
                        run.stop()
                    return

        workers = [asyncio.create_task(worker()) for _ in range(min(config.concurrency, len(todo)))]
        try:
            await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        finally:  # Ctrl-C lands here too: `asyncio.wait` leaves the workers running
            run.stop()
            await asyncio.wait(workers, timeout=config.timeout)
        for finished_worker in workers:
            finished_worker.result()
        if fatal:
            stored = len(store)
            message = f"The judge at {config.url} refused to go on ({fatal[0]}). {advice(fatal[0].kind, config)}"
            if stored:
                raise WorkError(f"{message} {stored} stored replies are kept; run again to go on from there.")
            raise UserError(message)


def _from_store(key: str, stored: Stored, question: Question, config: JudgeConfig) -> Answer | None:
    """A stored reply as an answer; None where the present settings do not take it for a verdict."""
    allow = config.allow_text_verdict or question.protocol.verdict == "rating"
    try:
        value = read(question, stored.response, allow)
    except UnreadableError:
        return None
    return Answer(
        key, value, None, stored.response, 0, stored.prompt_tokens, stored.completion_tokens, stored.seconds, True
    )
