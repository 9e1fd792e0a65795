"""The judge compares a model's outputs with the reference's: pairs in, a table of verdicts out.

    frame = judge(outputs, reference, config, store="judge/store.sqlite", task="alpaca_eval")
    write_verdicts(frame, "judge/alpaca_eval/verdicts.parquet")

AlpacaEval's convention: output_1 is the reference's, output_2 the model's; a preference lies in [1, 2], and
`preference - 1` is the probability that the model's output is better.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import pandas as pd

from eval.judge.asking.questions import Question
from eval.judge.client import Answer, Progress, ask_all
from eval.judge.config import JudgeConfig
from eval.judge.protocols.protocol import Protocol
from eval.judge.protocols.registry import find_protocol
from eval.judge.protocols.templates import render
from eval.judge.single import judge_singly
from eval.judge.store import open_store
from eval.judge.table import mean_verdict, unasked, verdict_row, verdict_table
from eval.outputs.matching import Pair, match_outputs
from otpo.errors import UserError
from otpo.files import Row


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
    answer: Answer | None = None,
) -> pd.DataFrame:
    """Ask the judge about every pair of a model's output and the reference's output for the same instruction.

    Identical outputs are a draw (1.5) without a call. With `config.both_orders` every pair is asked in both orders and
    has two rows; otherwise AlpacaEval's seeded rule picks the order. A protocol that shows one output at a time has one
    row a pair (`eval.judge.single`). A question without a verdict is a row with `error`
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
        answer: in place of the endpoint, which is then not called (`eval.judge.offline`).

    Returns:
        One row a verdict, with the columns of `eval.judge.table`, in the order of the reference. A missing string is
        NaN. In a `cached` row, tokens and `price_usd` are those of the run that paid, and `attempts` is 0. Of rows that
        share one reply (because the same outputs occur twice), the first has its tokens and price.

    Raises:
        UserError: instructions that do not match, wrong settings, or a key or model refused at the start.
        WorkError: a key or model refused later on. The replies so far are in the store.
    """
    protocol = find_protocol(config.protocol)
    pairs = match_outputs(outputs, reference, subset=subset)
    if config.samples > 1 and not config.temperature:
        raise UserError(
            f"judge.samples is {config.samples} and judge.temperature is 0, so every sample would be the same: set "
            "judge.temperature, such as 1."
        )
    if protocol.single:
        return judge_singly(pairs, protocol, config, store, task, progress, spent_usd, answer)
    asked = [(pair, model_is_first) for pair in pairs for model_is_first in _orders(pair, config, protocol)]
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
        samples = ask_all(questions, config, opened, with_settled, spent_usd, answer)
    verdicts = (mean_verdict(samples[i : i + config.samples]) for i in range(0, len(samples), config.samples))
    rows, paid = [], set()
    for pair, model_is_first in asked:
        verdict = unasked(pair) or next(verdicts)
        if model_is_first and not math.isnan(verdict.value):
            verdict = replace(verdict, value=3.0 - verdict.value)
        order = "model_first" if model_is_first else "reference_first"
        pays = verdict.key not in paid
        rows.append(verdict_row(pair, order, verdict, config, task, pays, protocol))
        paid.add(verdict.key)
    return verdict_table(rows)


def model_first(instruction: str, seed: int = 0) -> bool:
    """AlpacaEval's seeded rule: whether the model's output (output_2) is shown before the reference's."""
    draw = random.Random("is_switched_outputs" + instruction + str(seed))
    return draw.choices([False, True], k=1)[0]


def _orders(pair: Pair, config: JudgeConfig, protocol: Protocol) -> tuple[bool, ...]:
    """For each time the pair is asked: whether the model's output is shown first."""
    return (
        (False, True) if config.both_orders or protocol.both_orders else (model_first(pair.instruction, config.seed),)
    )


def _in_order(pair: Pair, model_is_first: bool) -> tuple[str, str]:
    return (pair.output, pair.reference) if model_is_first else (pair.reference, pair.output)
