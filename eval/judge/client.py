"""Asks the judge many questions: several at once, with one retry policy, within a budget, each reply stored at once."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from eval.judge.asking.identity import Identities
from eval.judge.asking.questions import Question, Verdict, verdict_of
from eval.judge.asking.ways import Way, keep_ways, messages_of, parameters, way_of
from eval.judge.budget import Budget, Pace, most_tokens_of, size_of
from eval.judge.config import JudgeConfig
from eval.judge.endpoint import FATAL, RETRIED, Endpoint, Failure, advice, open_endpoint
from eval.judge.event_loop import run_coroutine
from eval.judge.replies import Reading, UnreadableError, read_reply, read_usage
from eval.judge.store import Store, StoredReply, request_key
from otpo.errors import UserError, WorkError

BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS, LONGEST_RETRY_AFTER_SECONDS = 0.25, 30.0, 600.0

Progress = Callable[[int, int, int], None]
"""Called with (done, total, failures)."""

Answer = Callable[[str, dict[str, Any]], "str | Failure"]
"""Answers without a call: a question's key and the body of its request -> the reply, or why there is none."""


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
        self._pace = Pace(config)
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
        way, body = way_of(config, question.protocol), request_of(question, config)
        size, most_tokens = size_of(body), most_tokens_of(body) or question.protocol.max_tokens

        def failed(failure: Failure, raw: str | None = None) -> Verdict:
            detail = failure.detail or None
            return Verdict(key, math.nan, failure.kind, detail, raw, attempts, tokens[0], tokens[1])

        while True:
            if self._given_up:
                return failed(self._given_up)
            reserved = await self._budget.reserve(size, most_tokens)
            if reserved is None:
                return failed(Failure("budget"))
            booked, seconds = self._pace.book(size, most_tokens)
            await self._sleep(seconds)
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
                return verdict_of(key, found, StoredReply(raw, tokens[0], tokens[1], seconds), attempts)
            finally:
                # A reply that reports no tokens was paid for all the same: what was set aside for it stays spent.
                await self._budget.settle(reserved, size, used, unknown=raw is not None and not sum(used))
                self._pace.settle(booked, used)
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
            try:
                return read_reply(question.protocol, raw, allow_text)
            except UnreadableError as unreadable:  # logprobs were not asked for
                kind = "unparsable" if unreadable.kind == "no_logprobs" else unreadable.kind
                raise UnreadableError(kind, unreadable.said) from None
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
    answer: Answer | None = None,
) -> list[Verdict]:
    """Ask every question whose reply is not in the store yet.

    After Ctrl-C no further call starts; calls already running are finished (within `config.timeout`) and stored.

    Args:
        questions: what to ask. Equal questions are asked once.
        config: the endpoint and how to ask it.
        store: where replies are kept.
        progress: called after each verdict.
        spent_usd: already spent of `config.budget_usd`.
        answer: in place of the endpoint, which is then not called.

    Returns:
        The verdicts, in the order of the questions.

    Raises:
        UserError: wrong settings, or a key or model refused before anything was stored.
        WorkError: a key or model refused later on. The replies so far are in the store.
    """
    judge = store.judge_name(str(config.model))
    keys = [_key(question, config, judge) for question in questions]
    keep_ways(config, {question.protocol for question in questions}, store)
    times_asked, to_ask = Counter(keys), dict(zip(keys, questions, strict=True))
    verdicts: dict[str, Verdict] = {}
    identities = Identities(str(config.model), store)
    done = failures = 0

    def finished(verdict: Verdict) -> None:
        nonlocal done, failures
        verdicts[verdict.key] = verdict
        if verdict.raw and not (verdict.cached or verdict.error):
            identities.see(verdict.key, verdict.raw)
        done += times_asked[verdict.key]
        failures += times_asked[verdict.key] if verdict.error else 0
        if progress:
            progress(done, len(questions), failures)

    for key, question in list(to_ask.items()):
        stored = store.get(key)
        if stored is not None and (verdict := _from_store(key, stored, question, config)):
            del to_ask[key]
            finished(verdict)
    if answer is not None:
        for key, question in to_ask.items():
            finished(_answered(key, question, config, store, answer))
    elif to_ask:
        run_coroutine(_ask_new(list(to_ask.items()), config, store, finished, spent_usd))
    renamed: dict[str, str] = {}

    def new_key(key: str) -> str:
        renamed[key] = _key(to_ask[key], config, store.judge_name(str(config.model)))
        return renamed[key]

    identities.settle(new_key)
    return [replace(verdicts[key], key=renamed.get(key, key)) for key in keys]


def _answered(key: str, question: Question, config: JudgeConfig, store: Store, answer: Answer) -> Verdict:
    reply = answer(key, request_of(question, config))
    if isinstance(reply, Failure):
        return Verdict(key, error=reply.kind, detail=reply.detail or None)
    stored = StoredReply(reply, *read_usage(reply), 0.0)
    try:
        found = read_reply(question.protocol, reply, _allows_text(question, config, way_of(config, question.protocol)))
    except UnreadableError as unreadable:
        used = (stored.prompt_tokens, stored.completion_tokens)
        return Verdict(key, math.nan, unreadable.kind, unreadable.said, reply, 1, *used)
    store.put(key, str(config.model), stored)
    return verdict_of(key, found, stored, 1)


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


def request_of(question: Question, config: JudgeConfig) -> dict[str, Any]:
    """The body of the request that asks a question, in the way that the endpoint was found to take."""
    way = way_of(config, question.protocol)
    messages = messages_of(question.messages, question.protocol, way)
    return {"model": config.model, "messages": messages, **parameters(question.protocol, config, way, question.sample)}


def _key(question: Question, config: JudgeConfig, judge: str) -> str:
    """The key of a reply in the store: of everything that decides it."""
    body = request_of(question, config)
    messages = body.pop("messages")
    del body["model"]
    if question.sample:
        body["sample"] = question.sample  # not sent: a reply is another one each time
    return request_key(judge, messages, body)


def _allows_text(question: Question, config: JudgeConfig, way: Way) -> bool:
    return way.read != "logprobs" or config.allow_text_verdict or question.protocol.verdict == "rating"


def _from_store(key: str, stored: StoredReply, question: Question, config: JudgeConfig) -> Verdict | None:
    """The verdict of a stored reply; None if the present settings cannot read one from it."""
    allow_text = _allows_text(question, config, way_of(config, question.protocol))
    try:
        found = read_reply(question.protocol, stored.response, allow_text)
    except UnreadableError:
        return None
    return verdict_of(key, found, stored, 0, cached=True)
