"""Effective tokens: whether optimal transport weights the tokens of a completion differently at all.

The measure is the effective tokens, (sum w)^2 / sum w^2, as a share of the n tokens: 1 if all weights are equal, 1 / n
if one token has all the weight. It equals 1 / (1 + v^2), where v is the weights' standard deviation over their mean,
whatever the length of the completion. (Normalised entropy approaches 1 as completions get longer.)

It is reported for transport only, which is meant to tell tokens apart; `reg` decides how sharply. Other rules may give
equal weights by definition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from eval.board.numbers import count

NEARLY_UNIFORM = 0.98  # at this share, the weights' standard deviation is a seventh of their mean
MASS = "weights/transport_mass"  # logged by transport only


def effective_shares(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """Effective tokens over tokens, of the chosen and the rejected completion; None if transport did not weight them.

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
    """Whether the effective tokens of both completions exceed NEARLY_UNIFORM of their tokens."""
    return shares is not None and min(shares) > NEARLY_UNIFORM


def pair_sentence(row: Mapping[str, Any], label: str) -> str | None:
    """A warning about a pair whose weights are nearly uniform; None if they are not."""
    shares = effective_shares(row)
    if shares is None or not nearly_uniform(shares):
        return None
    means = [sum(row[f"{side}_weights"]) / len(row[f"{side}_weights"]) for side in ("chosen", "rejected")]
    return (
        f"Nearly uniform: {label} gives every chosen token a weight of about {means[0]:.2g} and every rejected one "
        f"about {means[1]:.2g} (effective tokens: {_percents(shares)}). Here it only rescales the two completions."
    )


def pairs_sentence(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """A warning that says in how many pairs the weights are nearly uniform; None if in none."""
    shares = [found for row in rows if (found := effective_shares(row)) is not None]
    uniform = sum(nearly_uniform(found) for found in shares)
    if not uniform:
        return None
    rule = f"the effective tokens of both completions exceed {NEARLY_UNIFORM:.0%} of their tokens"
    return f"The weights are nearly uniform in {uniform:,} of {count(len(shares), 'pair')} ({rule}). {_MEANING}"


def run_sentence(label: str, metrics: pd.DataFrame) -> str | None:
    """A warning about a training whose weights were nearly uniform over all its steps; None if they were not.

    Args:
        label: of the model.
        metrics: the lines of its `metrics.jsonl`; those of evaluations do not count.
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
        f"{label}: the token weights were nearly uniform over the run (effective tokens: {_percents(shares)}; above "
        f"{NEARLY_UNIFORM:.0%} counts as nearly uniform). {_MEANING} `otpo weights` shows pairs at several reg."
    )


_MEANING = "Such weights hardly tell tokens apart; they only rescale the two completions. A smaller reg sharpens them."


def _percents(shares: tuple[float, float]) -> str:
    return f"{shares[0]:.1%} of the chosen, {shares[1]:.1%} of the rejected"
