"""Outputs that the judge sees one at a time: each has a score, and the better of two scores wins."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from eval.judge.asking.questions import Question, Verdict
from eval.judge.client import Answer, Progress, ask_all
from eval.judge.config import JudgeConfig
from eval.judge.protocols.protocol import Protocol
from eval.judge.protocols.templates import render
from eval.judge.store import open_store
from eval.judge.table import cost_of, mean_verdict, unasked, verdict_row, verdict_table
from eval.outputs.matching import Pair
from otpo.files import Row

# Scores are weighted means, whose last digits depend on the order of their parts: those that differ there are equal.
EQUAL_DECIMALS = 9


def judge_singly(
    pairs: list[Pair],
    protocol: Protocol,
    config: JudgeConfig,
    store: str | Path,
    task: str,
    progress: Progress | None = None,
    spent_usd: float = 0.0,
    answer: Answer | None = None,
) -> pd.DataFrame:
    """Score a model's outputs and the reference's, each once, and compare the scores.

    The preference is 2 for the higher score, 1 for the lower one and 1.5 for equal ones; `score` and `reference_score`
    hold the two, `said` what was said of the model's output. Where either has none there is no preference, but the
    other's score is kept.

    Args:
        pairs: of a model's outputs and the reference's.
        protocol: of verdict "rating" or "criteria".
        config: the endpoint and how to ask it.
        store: SQLite file of the judge's replies.
        task: the task's name.
        progress: called with (done, total, failures), counted in outputs.
        spent_usd: already spent of `config.budget_usd`.
        answer: in place of the endpoint, which is then not called.

    Returns:
        One row a pair, with the columns of `eval.judge.table`. Tokens and price are those of both replies; of rows that
        share a reply, the first has its cost.

    Raises:
        UserError: wrong settings, or a key or model refused at the start.
        WorkError: a key or model refused later on. The replies so far are in the store.
    """
    wanted = list(dict.fromkeys((pair.instruction, text) for pair in pairs for text in _there(pair)))
    questions = [
        Question(render(protocol, *each), protocol, sample) for each in wanted for sample in range(config.samples)
    ]
    with open_store(store) as opened:
        samples = ask_all(questions, config, opened, progress, spent_usd, answer)
    k = config.samples
    verdicts = {each: mean_verdict(samples[k * i : k * (i + 1)]) for i, each in enumerate(wanted)}
    rows: list[Row] = []
    paid: set[str] = set()
    for pair in pairs:
        ours, theirs = (
            verdicts.get((pair.instruction, text), Verdict("missing", error="no_output"))
            for text in (pair.output, pair.reference)
        )
        verdict = _together(ours, theirs, paid)
        if pair.missing:
            lacking = unasked(pair)
            assert lacking is not None
            verdict = replace(verdict, error=lacking.error, detail=lacking.detail, value=math.nan)
        row = verdict_row(pair, "none", verdict, config, task, True, protocol)
        kept = [
            math.nan if side in pair.missing else each.value for side, each in (("output", ours), ("reference", theirs))
        ]
        rows.append(row | {"score": kept[0], "reference_score": kept[1]})
    return verdict_table(rows)


def _there(pair: Pair) -> list[str]:
    return [text for side, text in (("output", pair.output), ("reference", pair.reference)) if side not in pair.missing]


def _together(ours: Verdict, theirs: Verdict, paid: set[str]) -> Verdict:
    """One verdict of two scores, with the cost of both where no earlier row has it."""
    failed = next((each for each in (ours, theirs) if each.error), None)
    new = [each for each in {each.key: each for each in (ours, theirs)}.values() if each.key not in paid]
    paid |= {each.key for each in new}
    return replace(
        failed or ours,
        key=ours.key,
        value=math.nan if failed else 1.5 + 0.5 * float(np.sign(round(ours.value - theirs.value, EQUAL_DECIMALS))),
        said=ours.said,
        raw=json.dumps({"output": ours.raw, "reference": theirs.raw}),
        read=None if failed else ours.read,
        cached=ours.cached and theirs.cached,
        **cost_of(new),
    )
