"""The table of verdicts: its columns, a row of it, what it cost, and its file."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from eval.judge.asking.questions import Verdict
from eval.judge.budget import price
from eval.judge.config import JudgeConfig
from eval.judge.protocols.protocol import Protocol
from eval.outputs.matching import Pair
from otpo.files import Row, replacing

COLUMNS = {
    "task": "str", "generator": "str", "reference": "str", "index": "int64", "instruction": "str",
    "instruction_hash": "str", "output_hash": "str", "reference_hash": "str", "order": "str", "preference": "float64",
    "read": "str", "protocol": "str", "combine": "str", "said": "str", "weight": "float64", "score": "float64",
    "reference_score": "float64", "raw": "str", "error": "str", "detail": "str", "attempts": "int64",
    "prompt_tokens": "int64", "completion_tokens": "int64", "price_usd": "float64", "seconds": "float64",
    "cached": "bool", "key": "str", "judge_model": "str",
}  # fmt: skip
"""The columns of the table of verdicts and their types.

`key` finds the reply in the store. `combine` is "agreed" where both orders must name the same winner, else "mean".
`said` is a grade, or what was said of each criterion; `score` and `reference_score` are of outputs seen one at a time.
`judge_model` is what the endpoint calls the model that answered; of a panel, a JSON object of each judge's.
"""


def unasked(pair: Pair) -> Verdict | None:
    """The verdict on a pair that nobody is asked about: none where an output is missing, a draw of identical ones."""
    if pair.missing:
        return Verdict(key="missing", error=pair.missing, detail="the row has no output")
    return Verdict(key="", value=1.5, read="identical") if pair.output == pair.reference else None


def cost_of(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Calls, tokens and seconds of several verdicts together, as a verdict's fields."""
    counted = ("attempts", "prompt_tokens", "completion_tokens", "seconds")
    return {name: sum(getattr(each, name) for each in verdicts) for name in counted}


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
        weight=sum(each.weight for each in samples) / len(samples),
        said=None if first.said is None else "; ".join(str(each.said) for each in samples),
        raw=json.dumps([each.raw for each in samples]),
        read=None if failed else "samples",
        cached=all(each.cached for each in samples),
        **cost_of(samples),
    )


def verdict_row(
    pair: Pair, order: str, verdict: Verdict, config: JudgeConfig, task: str, pays: bool, protocol: Protocol | None
) -> Row:
    """One row of the table.

    Args:
        pair: what was judged.
        order: "reference_first", "model_first" or "none".
        verdict: its `value` is the preference for the model, whatever the order.
        config: has the prices.
        task: the task's name.
        pays: whether this row carries the tokens and the price of the reply; False if an earlier row does.
        protocol: how the judge was asked; None for a reward model.
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
        "protocol": protocol.label if protocol else "reward",
        "combine": "agreed" if protocol and protocol.agreed else "mean",
        "said": verdict.said,
        "weight": verdict.weight,
        "score": math.nan,
        "reference_score": math.nan,
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
        "judge_model": verdict.model,
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


def answering_models(frame: pd.DataFrame) -> dict[str, Counter[str]]:
    """Judge -> how many verdicts each model gave that answered under its name. A judge that is alone is ""."""
    found: dict[str, Counter[str]] = {}
    for cell, count in frame["judge_model"].value_counts().items() if "judge_model" in frame else ():
        for judge, model in _models_of(str(cell)).items():
            found.setdefault(judge, Counter())[model] += int(count)
    return found


def _models_of(cell: str) -> dict[str, str]:
    """What a cell of `judge_model` says: judge -> model."""
    try:
        found = json.loads(cell) if cell.startswith("{") else None
    except ValueError:
        found = None
    return {str(judge): str(model) for judge, model in found.items()} if isinstance(found, dict) else {"": cell}


def several_models(frame: pd.DataFrame) -> str:
    """That a judge's verdicts come from several models, and how many from each; empty where they do not."""
    several = {judge: counts for judge, counts in answering_models(frame).items() if len(counts) > 1}
    if not several:
        return ""
    told = " ".join(
        f"The judge's name {judge + ' ' if judge else ''}answers as several models: "
        f"{', '.join(f'{name} ({count:,})' for name, count in counts.most_common())}."
        for judge, counts in several.items()
    )
    return (
        f"{told} If it has changed for good, the same command asks the model that answers now about what the other one "
        "judged (of a kept leaderboard: `otpo board update --renew`)."
    )


def write_verdicts(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write the table as parquet, atomically."""
    with replacing(path) as partial:
        frame.to_parquet(partial, index=False)
    return Path(path)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
