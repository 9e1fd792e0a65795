"""The judge: pairs of answers in, a table of verdicts out.

    frame = judge(outputs, reference, config, store="judge/alpaca_eval/verdicts.sqlite", task="alpaca_eval")
    write_verdicts(frame, "judge/alpaca_eval/verdicts.parquet")

Convention of AlpacaEval: output_1 is the reference's, output_2 the model's, a preference lies in [1, 2], and
`preference - 1` is the probability that the model's answer is better.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Awaitable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from eval.judge.client import Answer, Progress, Question, ask_all, parameters, price
from eval.judge.config import JudgeConfig
from eval.judge.endpoint import Endpoint, Failure, advice, open_endpoint
from eval.judge.protocols import PROTOCOLS, find_protocol, model_first, render
from eval.judge.store import open_store
from eval.outputs import Pair, match_outputs
from otpo.errors import UserError, WorkError
from otpo.files import Row, replacing

COLUMNS = {
    "task": "str", "generator": "str", "reference": "str", "index": "int64", "instruction": "str",
    "instruction_hash": "str", "output_hash": "str", "reference_hash": "str", "order": "str", "preference": "float64",
    "raw": "str", "error": "str", "attempts": "int64", "prompt_tokens": "int64", "completion_tokens": "int64",
    "price_usd": "float64", "seconds": "float64", "cached": "bool", "key": "str",
}  # fmt: skip
"""The columns of the table of verdicts and their types; `key` finds the reply in the store."""


def judge(
    outputs: list[Row],
    reference: list[Row],
    config: JudgeConfig,
    store: str | Path,
    task: str,
    progress: Progress | None = None,
    *,
    subset: bool = False,
    spent_usd: float = 0.0,
) -> pd.DataFrame:
    """Ask the judge about every pair of a model's and the reference's answer to the same instruction.

    Identical answers are a draw (1.5) without a call. With `config.both_orders` each pair has two rows; otherwise
    AlpacaEval's seeded rule picks the order. A call that gave no verdict is a row with `error` and preference NaN.

    Args:
        outputs: the model's rows {instruction, output, generator}.
        reference: the reference's rows.
        config: the endpoint and how it is asked.
        store: SQLite file of the judge's replies; nothing in it is asked again.
        task: the task's name, a column of the result.
        progress: called with (done, total, failures) in rows of the result.
        subset: let `outputs` answer only a part of the reference's instructions.
        spent_usd: what calls of `judge` before this one have spent of `config.budget_usd`.

    Returns:
        A row a verdict, with COLUMNS, in the order of the reference. A missing string is NaN. `attempts`, tokens and
        `price_usd` of a `cached` row are those of the run that paid; its `attempts` are 0. Of rows that share one
        reply (the same answers twice) the first carries its tokens and price.

    Raises:
        UserError: instructions that do not match, wrong settings, or a key or model refused at the start.
        WorkError: a key or model refused in the middle; the replies so far are in the store.
    """
    protocol = find_protocol(config.protocol, "pair")
    pairs = match_outputs(outputs, reference, subset=subset)
    asked = [(pair, first) for pair in pairs for first in _orders(pair, config)]
    open_rows = [(pair, first) for pair, first in asked if pair.output != pair.reference]
    drawn = len(asked) - len(open_rows)

    def shifted(done: int, total: int, failures: int) -> None:
        if progress:
            progress(done + drawn, total + drawn, failures)

    questions = [
        Question(render(protocol, pair.instruction, *_shown(pair, model_is_first)), protocol)
        for pair, model_is_first in open_rows
    ]
    with open_store(store) as opened:
        answers = iter(ask_all(questions, config, opened, shifted, spent_usd))
    rows, paid = [], set()
    for pair, model_is_first in asked:
        answer = next(answers) if pair.output != pair.reference else Answer(key="", value=1.5)
        if model_is_first and not math.isnan(answer.value):
            answer = replace(answer, value=3.0 - answer.value)
        order = "model_first" if model_is_first else "reference_first"
        rows.append(verdict_row(pair, order, answer, config, task, pays=answer.key not in paid))
        paid.add(answer.key)
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def rate(
    items: list[Row], config: JudgeConfig, store: str | Path, progress: Progress | None = None
) -> list[float | None]:
    """Rate answers one at a time from 1 to 10 (protocol "rating", whatever `config.protocol` says).

    Args:
        items: rows {instruction, output}.
        config: the endpoint and how it is asked.
        store: SQLite file of the judge's replies.
        progress: called with (done, total, failures).

    Returns:
        A rating an item, None where the judge gave none.

    Raises:
        UserError: as `judge`.
        WorkError: as `judge`, or not one item could be rated.
    """
    protocol = PROTOCOLS["rating"]
    questions = [Question(render(protocol, item["instruction"], item["output"]), protocol) for item in items]
    with open_store(store) as opened:
        answers = ask_all(questions, config, opened, progress)
    if answers and all(answer.error for answer in answers):
        kinds = pd.Series([answer.error for answer in answers]).value_counts().to_dict()
        raise WorkError(f"The judge at {config.url} rated none of {len(answers)} answers: {_counted(kinds)}.")
    return [None if answer.error else answer.value for answer in answers]


def ledger(frame: pd.DataFrame) -> dict[str, Any]:
    """What a table of verdicts cost and how much of it failed.

    Returns:
        verdicts, identical (drawn without a call), cached, calls (made in this run), failed (count), errors (type ->
        count), prompt_tokens and completion_tokens (all), spent_usd (this run) and cached_usd (paid by earlier runs).
    """
    cached = frame["cached"]
    return {
        "verdicts": int(frame["preference"].notna().sum()),
        "identical": int((frame["key"] == "").sum()),
        "cached": int(cached.sum()),
        "calls": int(frame["attempts"].sum()),
        "failed": int(frame["error"].notna().sum()),
        "errors": {str(kind): int(n) for kind, n in frame["error"].value_counts().items()},
        "prompt_tokens": int(frame["prompt_tokens"].sum()),
        "completion_tokens": int(frame["completion_tokens"].sum()),
        "spent_usd": float(frame.loc[~cached, "price_usd"].sum()),
        "cached_usd": float(frame.loc[cached, "price_usd"].sum()),
    }


def write_verdicts(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write the table as parquet, atomically."""
    with replacing(path) as partial:
        frame.to_parquet(partial, index=False)
    return Path(path)


def check(config: JudgeConfig) -> None:
    """Find out, before anything is started, whether the judge can be asked at all. Buys no verdict.

    The list of models is read; where it does not name the model, a completion of one token is asked for.

    Raises:
        UserError: nothing listens at the address, the key is refused, or the model is not served.
    """
    if config.protocol not in PROTOCOLS:
        find_protocol(config.protocol, "pair")
    if config.protocol == "alpaca_eval":
        render(PROTOCOLS["alpaca_eval"], "", "", "")  # the package and its file are there
    asyncio.run(_check(config))


async def _check(config: JudgeConfig) -> None:
    probe = {
        "model": config.model,
        "messages": [{"role": "user", "content": "Reply with the letter m."}],
        **parameters(PROTOCOLS[config.protocol], config.model_copy(update={"max_tokens": 1})),
    }
    async with open_endpoint(config) as endpoint:
        listing = await _probe(endpoint.models(), config)
        if isinstance(listing, str) and _lists(listing, str(config.model)):
            return
        reply = await _ask_probe(endpoint, probe, config)
    if not isinstance(reply, Failure):
        return
    no_list = isinstance(listing, Failure) and listing.kind in ("not_found", "model_not_found")
    if no_list and reply.kind in ("not_found", "model_not_found"):
        raise UserError(
            f"{config.url} answers neither the list of models nor a chat completion ({reply}). "
            f"{advice('model_not_found', config)}"
        )
    if reply.kind == "model_not_found":
        raise UserError(f"The judge does not serve the model ({reply}). {advice('model_not_found', config)}")
    if reply.kind == "bad_request" and any(name in reply.detail for name in ("logprobs", "max_tokens", "temperature")):
        raise UserError(
            f"The judge at {config.url} does not take a setting that is sent ({reply}). Change judge.temperature, "
            "judge.max_tokens or judge.extra_body, or use another judge."
        )


async def _ask_probe(endpoint: Endpoint, body: dict, config: JudgeConfig) -> str | Failure | None:
    """The probe's reply; tried again where the failure may be passing, None where it never got better."""
    for attempt in range(min(config.max_retries, 3) + 1):
        reply = await _probe(endpoint.complete(body), config)
        if isinstance(reply, str) or reply.kind not in ("rate_limited", "server_error", "connection", "timeout"):
            return reply
        await asyncio.sleep(min(reply.retry_after or 0.25 * 2**attempt, 5.0))
    return None


async def _probe(call: Awaitable[str], config: JudgeConfig) -> str | Failure:
    """A reply or its failure; a failure that no run could survive is raised."""
    try:
        return await call
    except Failure as failure:
        if failure.kind == "auth":
            raise UserError(
                f"The judge at {config.url} refused the key ({failure}). {advice('auth', config)}"
            ) from None
        if failure.kind == "quota":
            raise UserError(f"The judge at {config.url}: {failure}. {advice('quota', config)}") from None
        if failure.kind == "connection" and failure.detail == "connection refused":
            raise UserError(
                f"No judge answers at {config.url} ({failure.detail}). Start it or correct judge.url."
            ) from None
        return failure


def _lists(listing: str, model: str) -> bool:
    try:
        return any(entry.get("id") == model for entry in json.loads(listing)["data"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _orders(pair: Pair, config: JudgeConfig) -> tuple[bool, ...]:
    """For each time the pair is asked, whether the model's answer is shown first."""
    return (False, True) if config.both_orders else (model_first(pair.instruction, config.seed),)


def _shown(pair: Pair, model_is_first: bool) -> tuple[str, str]:
    return (pair.output, pair.reference) if model_is_first else (pair.reference, pair.output)


def verdict_row(pair: Pair, order: str, answer: Answer, config: JudgeConfig, task: str, pays: bool) -> Row:
    """One row of the table; the answer's value is the preference, whatever the order in which it was asked for."""
    tokens = (answer.prompt_tokens, answer.completion_tokens) if pays else (0, 0)
    return {
        "task": task,
        "generator": pair.generator,
        "reference": pair.reference_generator,
        "index": pair.index,
        "instruction": pair.instruction,
        "instruction_hash": _sha256(pair.instruction),
        "output_hash": _sha256(pair.output),
        "reference_hash": _sha256(pair.reference),
        "order": order,
        "preference": answer.value,
        "raw": answer.raw,
        "error": answer.error,
        "attempts": answer.attempts if pays else 0,
        "prompt_tokens": tokens[0],
        "completion_tokens": tokens[1],
        "price_usd": price(config, *tokens),
        "seconds": answer.seconds,
        "cached": answer.cached,
        "key": answer.key,
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _counted(kinds: dict) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())
