"""A reward model as the judge: the scores of single outputs become preferences in the table of verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import pandas as pd

from eval.judge.asking.questions import Verdict
from eval.judge.config import JudgeConfig
from eval.judge.table import unasked, verdict_row, verdict_table
from eval.outputs.matching import match_outputs
from otpo.files import Row

Scores = Callable[[Sequence[tuple[str, str]]], list[float]]
"""(instruction, output) pairs -> the score of each; higher is better."""


def judge_by_scores(
    outputs: list[Row], reference: list[Row], scores: Scores, task: str, *, subset: bool = False
) -> pd.DataFrame:
    """Compare a model's outputs with the reference's by a reward model's scores.

    The preference is 1 + sigmoid(r_model - r_reference): the Bradley-Terry probability that the model's output is
    better, in AlpacaEval's convention. Identical outputs are a draw (1.5) without a score, and where one is missing
    there is no verdict. Each output is scored alone, so `order` is "none". `raw` holds both scores.

    Args:
        outputs: the model's rows {instruction, output, generator}.
        reference: the reference's rows.
        scores: the reward model; called once, with each output once.
        task: the task's name, a column of the result.
        subset: allow `outputs` to cover only some of the reference's instructions.

    Returns:
        One row a verdict, with the columns of `eval.judge.table`, in the order of the reference.

    Raises:
        UserError: instructions that do not match.
    """
    pairs = match_outputs(outputs, reference, subset=subset)
    asked = list(
        dict.fromkeys(
            (pair.instruction, text)
            for pair in pairs
            if unasked(pair) is None
            for text in (pair.output, pair.reference)
        )
    )
    score = dict(zip(asked, scores(asked), strict=True))
    rows = []
    for pair in pairs:
        verdict = unasked(pair)
        if verdict is None:
            ours, theirs = score[pair.instruction, pair.output], score[pair.instruction, pair.reference]
            raw = json.dumps({"score": ours, "reference_score": theirs})
            verdict = Verdict(key="scored", value=1.0 + _sigmoid(ours - theirs), raw=raw, read="score")
        rows.append(verdict_row(pair, "none", verdict, JudgeConfig(), task, pays=True, protocol=None))
    return verdict_table(rows)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
