"""How even the token weights of optimal transport are, and the sentences that say so.

The measure is the share of effective tokens, (sum w)^2 / sum w^2 over the number of tokens: 1 where all tokens of an
answer weigh alike, 1 / n where one carries everything. It equals 1 / (1 + v^2) with v the weights' standard deviation
over their mean, whatever the answer's length; normalised entropy comes near 1 faster the longer the answer is.

Only transport is spoken of: it is meant to tell tokens apart, and `reg` decides how sharply. Rules that weigh alike by
definition (a mean, a sum) have nothing to say here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from eval.board.sentences import count

NEARLY_UNIFORM = 0.98  # share of effective tokens: the weights' standard deviation is a seventh of their mean
MASS = "weights/transport_mass"  # only transport logs it


def effective_shares(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Effective tokens over tokens of the chosen and the rejected answer; None unless transport weighed them.

    Args:
        row: of weights.json: chosen_weights (m,), rejected_weights (n,) and their `metrics`.
    """
    metrics = row.get("metrics") or {}
    lengths = [len(row[f"{side}_weights"]) for side in ("chosen", "rejected")]
    if MASS not in metrics or not all(lengths):
        return None
    chosen, rejected = (
        metrics[f"weights/effective_tokens_{side}"] / length
        for side, length in zip(("chosen", "rejected"), lengths, strict=True)
    )
    return chosen, rejected


def nearly_uniform(shares: tuple[float, float] | None) -> bool:
    """Whether both answers' effective tokens exceed NEARLY_UNIFORM of their tokens."""
    return shares is not None and min(shares) > NEARLY_UNIFORM


def pair_sentence(row: Mapping[str, Any], label: str) -> str | None:
    """What to know about a pair whose weights are nearly uniform."""
    shares = effective_shares(row)
    if shares is None or not nearly_uniform(shares):
        return None
    means = [sum(row[f"{side}_weights"]) / len(row[f"{side}_weights"]) for side in ("chosen", "rejected")]
    return (
        f"Nearly uniform: under {label} every chosen token weighs about {means[0]:.2g} and every rejected one about "
        f"{means[1]:.2g} (effective tokens: {_percents(shares)}). Here it does little but rescale the two answers."
    )


def pairs_sentence(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """In how many pairs the weights are nearly uniform, if in any."""
    shares = [found for row in rows if (found := effective_shares(row)) is not None]
    even = sum(nearly_uniform(found) for found in shares)
    if not even:
        return None
    rule = f"both answers' effective tokens exceed {NEARLY_UNIFORM:.0%} of their tokens"
    return f"The weights are nearly uniform in {even:,} of {count(len(shares), 'pair')} ({rule}). {_MEANING}"


def run_sentence(label: str, metrics: pd.DataFrame) -> str | None:
    """What to know about a training run whose weights were nearly uniform, over all its steps and tokens.

    Args:
        metrics: the lines of `metrics.jsonl`; those of evaluations are left out.
    """
    names = [f"{name}{side}" for name in ("weights/effective_tokens_", "lengths/") for side in ("chosen", "rejected")]
    if not {"loss", MASS, *names} <= set(metrics):
        return None
    effective_c, effective_r, tokens_c, tokens_r = metrics[metrics["loss"].notna()][names].sum()
    if not (tokens_c and tokens_r):
        return None
    shares = float(effective_c / tokens_c), float(effective_r / tokens_r)
    if not nearly_uniform(shares):
        return None
    return (
        f"{label}: the token weights were nearly uniform over the run (effective tokens: {_percents(shares)}; the line "
        f"is drawn at {NEARLY_UNIFORM:.0%}). {_MEANING} `otpo weights` shows pairs at several."
    )


_MEANING = (
    "Such weights hardly tell tokens apart: they do little but rescale the two answers. A smaller reg sharpens them."
)


def _percents(shares: tuple[float, float]) -> str:
    return f"{shares[0]:.1%} of the chosen, {shares[1]:.1%} of the rejected"
