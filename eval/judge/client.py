"""Asks the judge many questions: several at once, with one retry policy, within a budget, each reply stored at once."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from eval.judge.asking.ways import Way, keep_ways, messages_of, parameters, way_of
from eval.judge.budget import Budget
from eval.judge.config import JudgeConfig
from eval.judge.endpoint import FATAL, RETRIED, Endpoint, Failure, advice, open_endpoint
from eval.judge.event_loop import run_coroutine
from eval.judge.prompt_templates import Message
from eval.judge.protocols import Protocol
from eval.judge.replies import Reading, UnreadableError, read_reply, read_usage
from eval.judge.store import Store, StoredReply, request_key
from otpo.errors import UserError, WorkError

BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS, LONGEST_RETRY_AFTER_SECONDS = 0.25, 30.0, 600.0

Progress = Callable[[int, int, int], None]
"""Called with (done, total, failures)."""


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
        value: a preference in [1, 2] or a rating in [1, 10]; NaN exactly if there is an `error`.
        read: where the verdict was read: "logprobs", "json" or "text".
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


class JudgingSession:
    """One series of questions to an endpoint: the retry policy, the store, and the reasons to stop early.

    Args:
        endpoint: where to ask.
        config: how to ask.
        store: where replies are kept.
        spent: USD already spent of `config.budget_usd`.
    """

    def __init__(self, endpoint: Endpoint, config: JudgeConfig, store: Store, spent: float):
        self._endpoint, self._config, self._store = endpoint, config, store
        self._budget = Budget(config, spent)
        self._stop = asyncio.Event()
        self._next_start = 0.0
        self._failed_in_a_row = 0
        self._answered = False
        self._given_up: Failure | None = None
        self._with_logprobs, self._without_logprobs = 0, 0

    def stop(self) -> None:
        """Start no further call. Calls already running are finished and stored."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Whether no further call will start."""
        return self._stop.is_set()

    async def ask(self, question: Question, key: str) -> Verdict:
        """Ask, with retries, until there is a verdict or a failure that retrying cannot mend.

        Raises:
            Failure: of a kind in FATAL, or "stopped" if the session was stopped before a call.
        """
        config, attempts, tokens = self._config, 0, [0, 0]
        way = way_of(config, question.protocol)
        messages, fields = (
            messages_of(question.messages, question.protocol, way),
            parameters(question.protocol, config, way),
        )
        body = {"model": config.model, "messages": messages, **fields}
        size = sum(len(message["content"].encode("utf-8", "surrogatepass")) + 16 for message in messages)
        most_tokens = fields.get(way.tokens_field) or question.protocol.max_tokens

        def failed(failure: Failure, raw: str | None = None) -> Verdict:
            detail = failure.detail or None
            return Verdict(key, math.nan, failure.kind, detail, raw, attempts, tokens[0], tokens[1])

        while True:
            if self._given_up:
                return failed(self._given_up)
            reserved = await self._budget.reserve(size, most_tokens)
            if reserved is None:
                return failed(Failure("budget"))
            await self._wait_for_turn()
            if self.stopped:
                await self._budget.settle(reserved, size, (0, 0))
                raise Failure("stopped")
            attempts += 1
            started, used, raw = time.perf_counter(), (0, 0), None
            try:
                raw = await self._endpoint.complete(body)
                used = read_usage(raw)
                found = self._read(question, way, raw, last=attempts > config.max_retries)
            except Failure as failure:
                error = failure
            except UnreadableError as unreadable:
                error = Failure(unreadable.kind, unreadable.said)
            else:
                tokens[0] += used[0]
                tokens[1] += used[1]
                seconds = time.perf_counter() - started
                self._store.put(key, str(config.model), StoredReply(raw, tokens[0], tokens[1], seconds))
                self._failed_in_a_row, self._answered = 0, True
                spent = (tokens[0], tokens[1], seconds)
                return Verdict(key, found.value, None, None, raw, attempts, *spent, read=found.read)
            finally:
                await self._budget.settle(reserved, size, used)
            tokens[0] += used[0]
            tokens[1] += used[1]
            if error.kind in FATAL:
                raise error
            if error.kind not in RETRIED:
                # One question may be at fault, but where no question has had an answer it is not the questions.
                if self._answered or error.kind in ("refused", "context_length"):
                    self._failed_in_a_row = 0
                else:
                    self._count_failure(error)
                return failed(error, raw)
            hopeless = error.kind == "no_logprobs" and self._never_logprobs
            if hopeless or attempts > config.max_retries or (error.retry_after or 0) > LONGEST_RETRY_AFTER_SECONDS:
                self._count_failure(error)
                return failed(error, raw)
            await self._pause(attempts, error.retry_after)

    def _read(self, question: Question, way: Way, raw: str, last: bool) -> Reading:
        """Read a verdict. A reply without logprobs is asked for again; only the last attempt may be read as text."""
        allow_text = _allows_text(question, self._config, way)
        if way.read != "logprobs":
            return read_reply(question.protocol, raw, allow_text)
        try:
            found = read_reply(question.protocol, raw, allow_text=False)
        except UnreadableError as unreadable:
            if unreadable.kind == "no_logprobs":
                self._without_logprobs += 1
                # An endpoint that has never sent logprobs will not start: asking again only costs.
                last = last or self._never_logprobs
            if not allow_text or (unreadable.kind == "no_logprobs" and not last):
                raise
            return read_reply(question.protocol, raw, allow_text=True)
        self._with_logprobs += 1
        return found

    @property
    def _never_logprobs(self) -> bool:
        return self._without_logprobs >= 10 and not self._with_logprobs

    def _count_failure(self, failure: Failure) -> None:
        """Give up on the endpoint once as many questions in a row have failed for good as are asked at once."""
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= max(self._config.concurrency, 8):
            self._given_up = failure

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
        """Sleep until the time is over or the session is stopped."""
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
) -> list[Verdict]:
    """Ask every question whose reply is not in the store yet.

    After Ctrl-C no further call starts; calls already running are finished (within `config.timeout`) and stored.

    Args:
        questions: what to ask. Equal questions are asked once.
        config: the endpoint and how to ask it.
        store: where replies are kept.
        progress: called after each verdict.
        spent_usd: already spent of `config.budget_usd`.

    Returns:
        The verdicts, in the order of the questions.

    Raises:
        UserError: wrong settings, or a key or model refused before anything was stored.
        WorkError: a key or model refused later on. The replies so far are in the store.
    """
    keys = [_key(question, config) for question in questions]
    keep_ways(config, {question.protocol for question in questions}, store)
    times_asked, to_ask = Counter(keys), dict(zip(keys, questions, strict=True))
    verdicts: dict[str, Verdict] = {}
    done = failures = 0

    def finished(verdict: Verdict) -> None:
        nonlocal done, failures
        verdicts[verdict.key] = verdict
        done += times_asked[verdict.key]
        failures += times_asked[verdict.key] if verdict.error else 0
        if progress:
            progress(done, len(questions), failures)

    for key, question in list(to_ask.items()):
        stored = store.get(key)
        if stored is not None and (verdict := _from_store(key, stored, question, config)):
            del to_ask[key]
            finished(verdict)
    if to_ask:
        run_coroutine(_ask_new(list(to_ask.items()), config, store, finished, spent_usd))
    return [verdicts[key] for key in keys]


async def _ask_new(
    to_ask: list[tuple[str, Question]],
    config: JudgeConfig,
    store: Store,
    finished: Callable[[Verdict], None],
    spent_usd: float,
) -> None:
    async with open_endpoint(config) as endpoint:
        session, queue = JudgingSession(endpoint, config, store, spent_usd), iter(to_ask)
        fatal: list[Failure] = []

        async def worker() -> None:
            for key, question in queue:
                if session.stopped:
                    return
                try:
                    finished(await session.ask(question, key))
                except Failure as failure:
                    if failure.kind != "stopped":
                        fatal.append(failure)
                        session.stop()
                    return

        workers = [asyncio.create_task(worker()) for _ in range(min(config.concurrency, len(to_ask)))]
        try:
            await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
        finally:  # also after Ctrl-C, which leaves the workers running
            session.stop()
            await asyncio.wait(workers, timeout=config.timeout)
        for finished_worker in workers:
            finished_worker.result()
        if fatal:
            stored = len(store)
            message = f"The judge at {config.url} refused to go on ({fatal[0]}). {advice(fatal[0].kind, config)}"
            if stored:
                raise WorkError(f"{message} {stored} stored replies are kept; run again to go on from there.")
            raise UserError(message)


def _key(question: Question, config: JudgeConfig) -> str:
    way = way_of(config, question.protocol)
    fields = parameters(question.protocol, config, way)
    if question.sample:
        fields["sample"] = question.sample  # not sent: a reply is another one each time
    return request_key(str(config.model), messages_of(question.messages, question.protocol, way), fields)


def _allows_text(question: Question, config: JudgeConfig, way: Way) -> bool:
    return way.read != "logprobs" or config.allow_text_verdict or question.protocol.verdict == "rating"


def _from_store(key: str, stored: StoredReply, question: Question, config: JudgeConfig) -> Verdict | None:
    """The verdict of a stored reply; None if the present settings cannot read one from it."""
    allow_text = _allows_text(question, config, way_of(config, question.protocol))
    try:
        found = read_reply(question.protocol, stored.response, allow_text)
    except UnreadableError:
        return None
    return Verdict(
        key,
        found.value,
        raw=stored.response,
        prompt_tokens=stored.prompt_tokens,
        completion_tokens=stored.completion_tokens,
        seconds=stored.seconds,
        cached=True,
        read=found.read,
    )
