"""A reward model as the judge: scores of single answers become preferences in the table of verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import pandas as pd

from eval.judge.client import Answer
from eval.judge.config import JudgeConfig
from eval.judge.verdicts import COLUMNS, verdict_row
from eval.outputs import match_outputs
from otpo.files import Row

Scores = Callable[[Sequence[tuple[str, str]]], list[float]]
"""(instruction, answer) pairs -> the score of each; higher is better."""


def judge_by_scores(
    outputs: list[Row], reference: list[Row], scores: Scores, task: str, *, subset: bool = False
) -> pd.DataFrame:
    """The verdicts of a reward model on every pair of a model's and the reference's answer.

    The preference is 1 + sigma(r_model - r_reference): what the Bradley-Terry model says of two scores, in AlpacaEval's
    convention. Identical answers are a draw (1.5) without a score. Each answer is scored alone, so there is no order;
    `raw` holds both scores.

    Args:
        outputs, reference, task, subset: as `eval.judge.verdicts.judge`. scores: gives the scores of a list of answers.

    Returns:
        A row a verdict, with the columns of `judge`, in the order of the reference; `order` is "none".

    Raises:
        UserError: instructions that do not match.
    """
    pairs = match_outputs(outputs, reference, subset=subset)
    asked = list(
        dict.fromkeys(
            (pair.instruction, text)
            for pair in pairs
            if pair.output != pair.reference
            for text in (pair.output, pair.reference)
        )
    )
    score = dict(zip(asked, scores(asked), strict=True))
    rows = []
    for pair in pairs:
        answer = Answer(key="", value=1.5)
        if pair.output != pair.reference:
            ours, theirs = score[pair.instruction, pair.output], score[pair.instruction, pair.reference]
            raw = json.dumps({"score": ours, "reference_score": theirs})
            answer = Answer(key="scored", value=1.0 + _sigmoid(ours - theirs), raw=raw)
        rows.append(verdict_row(pair, "none", answer, JudgeConfig(), task, pays=True))
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
