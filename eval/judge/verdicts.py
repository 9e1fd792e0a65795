"""The judge compares a model's outputs with the reference's: pairs in, a table of verdicts out.

    frame = judge(outputs, reference, config, store="judge/store.sqlite", task="alpaca_eval")
    write_verdicts(frame, "judge/alpaca_eval/verdicts.parquet")

AlpacaEval's convention: output_1 is the reference's, output_2 the model's; a preference lies in [1, 2], and
`preference - 1` is the probability that the model's output is better.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from eval.judge.budget import price
from eval.judge.client import Progress, Question, Verdict, ask_all
from eval.judge.config import JudgeConfig
from eval.judge.prompt_templates import render
from eval.judge.protocols import find_protocol
from eval.judge.store import open_store
from eval.outputs.matching import Pair, match_outputs
from otpo.errors import UserError
from otpo.files import Row, replacing

COLUMNS = {
    "task": "str", "generator": "str", "reference": "str", "index": "int64", "instruction": "str",
    "instruction_hash": "str", "output_hash": "str", "reference_hash": "str", "order": "str", "preference": "float64",
    "read": "str", "raw": "str", "error": "str", "detail": "str", "attempts": "int64", "prompt_tokens": "int64",
    "completion_tokens": "int64", "price_usd": "float64", "seconds": "float64", "cached": "bool", "key": "str",
}  # fmt: skip
"""The columns of the table of verdicts and their types. `key` finds the reply in the store."""


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
    """Ask the judge about every pair of a model's output and the reference's output for the same instruction.

    Identical outputs are a draw (1.5) without a call. With `config.both_orders` every pair is asked in both orders and
    has two rows; otherwise AlpacaEval's seeded rule picks the order. A question without a verdict is a row with `error`
    and preference NaN; so is a pair of which an output is missing, about which nothing is asked.

    Args:
        outputs: the model's rows {instruction, output, generator}; an output of None is missing.
        reference: the reference's rows.
        config: the endpoint and how to ask it.
        store: SQLite file of the judge's replies; nothing in it is asked again.
        task: the task's name, a column of the result.
        progress: called with (done, total, failures), counted in rows of the result.
        subset: allow `outputs` to cover only some of the reference's instructions.
        spent_usd: what earlier calls of `judge` have spent of `config.budget_usd`.

    Returns:
        One row a verdict, with COLUMNS, in the order of the reference. A missing string is NaN. In a `cached` row,
        tokens and `price_usd` are those of the run that paid, and `attempts` is 0. Of rows that share one reply
        (because the same outputs occur twice), the first has its tokens and price.

    Raises:
        UserError: instructions that do not match, wrong settings, or a key or model refused at the start.
        WorkError: a key or model refused later on. The replies so far are in the store.
    """
    protocol = find_protocol(config.protocol, "pair")
    asked = [
        (pair, model_is_first)
        for pair in match_outputs(outputs, reference, subset=subset)
        for model_is_first in _orders(pair, config)
    ]
    if config.samples > 1 and not config.temperature:
        raise UserError(
            f"judge.samples is {config.samples} and judge.temperature is 0, so every sample would be the same: set "
            "judge.temperature, such as 1."
        )
    questions = [
        Question(render(protocol, pair.instruction, *_in_order(pair, model_is_first)), protocol, sample)
        for pair, model_is_first in asked
        if unasked(pair) is None
        for sample in range(config.samples)
    ]
    settled = len(asked) - len(questions) // config.samples
    missing = sum(bool(pair.missing) for pair, _ in asked)

    def with_settled(done: int, total: int, failures: int) -> None:
        if progress:
            progress(done + settled, total + settled, failures + missing)

    with open_store(store) as opened:
        samples = ask_all(questions, config, opened, with_settled, spent_usd)
    verdicts = (mean_verdict(samples[i : i + config.samples]) for i in range(0, len(samples), config.samples))
    rows, paid = [], set()
    for pair, model_is_first in asked:
        verdict = unasked(pair) or next(verdicts)
        if model_is_first and not math.isnan(verdict.value):
            verdict = replace(verdict, value=3.0 - verdict.value)
        order = "model_first" if model_is_first else "reference_first"
        rows.append(verdict_row(pair, order, verdict, config, task, pays=verdict.key not in paid))
        paid.add(verdict.key)
    return verdict_table(rows)


def unasked(pair: Pair) -> Verdict | None:
    """The verdict on a pair that nobody is asked about: none where an output is missing, a draw of identical ones."""
    if pair.missing:
        return Verdict(key="missing", error=pair.missing, detail="the row has no output")
    return Verdict(key="", value=1.5, read="identical") if pair.output == pair.reference else None


def mean_verdict(samples: list[Verdict]) -> Verdict:
    """The verdict of several samples of a question: their mean, and what all of them cost.

    It fails if one of them does: the others may be those that were easy to tell.
    """
    first = samples[0]
    if len(samples) == 1:
        return first
    failed = next((each for each in samples if each.error), None)
    return replace(
        failed or first,
        key=first.key,
        value=math.nan if failed else sum(each.value for each in samples) / len(samples),
        raw=json.dumps([each.raw for each in samples]),
        read=None if failed else "samples",
        attempts=sum(each.attempts for each in samples),
        prompt_tokens=sum(each.prompt_tokens for each in samples),
        completion_tokens=sum(each.completion_tokens for each in samples),
        seconds=sum(each.seconds for each in samples),
        cached=all(each.cached for each in samples),
    )


def model_first(instruction: str, seed: int = 0) -> bool:
    """AlpacaEval's seeded rule: whether the model's output (output_2) is shown before the reference's."""
    draw = random.Random("is_switched_outputs" + instruction + str(seed))
    return draw.choices([False, True], k=1)[0]


def verdict_row(pair: Pair, order: str, verdict: Verdict, config: JudgeConfig, task: str, pays: bool) -> Row:
    """One row of the table.

    Args:
        pair: what was judged.
        order: "reference_first", "model_first" or "none".
        verdict: its `value` is the preference for the model, whatever the order.
        config: has the prices.
        task: the task's name.
        pays: whether this row carries the tokens and the price of the reply; False if an earlier row does.
    """
    tokens = (verdict.prompt_tokens, verdict.completion_tokens) if pays else (0, 0)
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
        "preference": verdict.value,
        "read": verdict.read,
        "raw": verdict.raw,
        "error": verdict.error,
        "detail": verdict.detail,
        "attempts": verdict.attempts if pays else 0,
        "prompt_tokens": tokens[0],
        "completion_tokens": tokens[1],
        "price_usd": price(config, *tokens),
        "seconds": verdict.seconds,
        "cached": verdict.cached,
        "key": verdict.key,
    }


def verdict_table(rows: list[Row]) -> pd.DataFrame:
    """Rows of `verdict_row` as a table with COLUMNS."""
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def ledger(frame: pd.DataFrame) -> dict[str, Any]:
    """What the verdicts of a table cost, and how many failed.

    Returns:
        Counts: verdicts, identical (draws without a call), cached, calls (made by this run), failed, and errors (kind
        -> count); prompt_tokens and completion_tokens of all rows; spent_usd (by this run) and cached_usd (by earlier
        runs).
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


def _orders(pair: Pair, config: JudgeConfig) -> tuple[bool, ...]:
    """For each time the pair is asked: whether the model's output is shown first."""
    return (False, True) if config.both_orders else (model_first(pair.instruction, config.seed),)


def _in_order(pair: Pair, model_is_first: bool) -> tuple[str, str]:
    return (pair.output, pair.reference) if model_is_first else (pair.reference, pair.output)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
