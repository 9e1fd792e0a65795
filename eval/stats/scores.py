"""Scores beside the win rate: of grades, where strong wins count more, and of outputs that were seen one at a time."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from eval.stats.agreement import grouped_mean
from eval.stats.intervals import NEAR, mean_intervals
from eval.stats.style_control import Games, style_controlled, style_differences
from eval.stats.win_rate import by_prompt, valid_preferences

Texts = Mapping[int, tuple[str, str]]
"""Number of a prompt -> the model's output and the reference's; prompts that lack one are not in it."""

RATINGS, PERCENT = (1.0, 10.0), (0.0, 100.0)
CRITERION = "criterion: "


def scores(verdicts: pd.DataFrame, texts: Callable[[str], Texts]) -> dict[str, dict[str, Any]]:
    """The scores of each model.

    Args:
        verdicts: of one task and reference (columns of `eval.judge.table`; an earlier version's may lack some).
        texts: the outputs of a model and the reference's.

    Returns:
        Model -> columns of the leaderboard. Of grades: score (percent of games won, a tie half, each as often as its
        grade counts) with score_low and score_high, and style_controlled with its ends. Of single outputs: score and
        reference_score (mean rating, 1 to 10, or of criteria the weighted mean, in percent), the score's interval, and
        "criterion: NAME" (the mean of each; of yes or no in percent). Empty for other verdicts.
    """
    if "said" not in verdicts or verdicts.empty:
        return {}
    if verdicts["score"].notna().any():
        return {str(name): _single(own) for name, own in verdicts.groupby("generator", sort=False)}
    if verdicts["said"].isna().all():
        return {}
    games = {}
    found: dict[str, dict[str, Any]] = {}
    for name, own in verdicts.groupby("generator", sort=False):
        whole = by_prompt(own).set_index("index")["preference"].notna()
        own = own[own["index"].map(whole) & own["preference"].notna()]
        found[str(name)] = {}
        if not (own["combine"] == "agreed").any():
            parts = grouped_mean("score", _won(own), own["index"].to_numpy(int), own["weight"])
            found[str(name)] = {key: None if part is None else 100 * part for key, part in parts.items()}
        games[str(name)] = _games(own, texts(str(name)))
    for name, (level, ends) in style_controlled(games).items():
        found[name] |= {
            "style_controlled": level, "style_controlled_low": ends.low, "style_controlled_high": ends.high,
        }  # fmt: skip
    return found


def _won(verdicts: pd.DataFrame) -> np.ndarray:
    return valid_preferences(verdicts["preference"]) - 1


def _games(own: pd.DataFrame, texts: Texts) -> Games:
    shown = own[own["index"].isin(texts.keys())]
    pairs = [texts[index] for index in shown["index"]]
    style = style_differences([ours for ours, _ in pairs], [theirs for _, theirs in pairs])
    return Games(_won(shown), shown["weight"].to_numpy(float), style, shown["index"].to_numpy(int))


def _single(own: pd.DataFrame) -> dict[str, Any]:
    known = own["score"].dropna().to_numpy(float)
    theirs = own["reference_score"].dropna()
    figures: dict[str, Any] = {
        "score": float(known.mean()) if len(known) else None,
        "reference_score": float(theirs.mean()) if len(theirs) else None,
    }
    criteria = _criteria(own["said"].dropna().tolist())
    if len(known):
        low, high = mean_intervals(known, PERCENT if criteria else RATINGS, NEAR)
        figures |= {"score_low": float(low[0]), "score_high": float(high[0])}
    return figures | {f"{CRITERION}{name}": float(np.mean(values)) for name, values in criteria.items()}


def _criteria(said: Sequence[str]) -> dict[str, list[float]]:
    """What was said of each criterion. True is 100; numbers stay as they are. Several samples are several values."""
    found: dict[str, list[float]] = defaultdict(list)
    for text in said:
        for part in text.split("; {"):
            given = json.loads(part if part.startswith("{") else "{" + part)
            for name, value in given.items():
                found[name].append(100.0 * value if isinstance(value, bool) else float(value))
    return found
