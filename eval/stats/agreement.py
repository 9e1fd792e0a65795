"""How far a judge agrees with people, with itself when two outputs change places, and people with each other.

All figures are fractions, with 95 % intervals over instructions. A preference lies in [1, 2], and `preference - 1` is
the probability that output_2 is better; a label is 1 or 2 for the better output, or 0 for a tie.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from eval.stats.intervals import NEAR, mean_intervals
from eval.stats.win_rate import valid_preferences

TIE, UNDECIDED = 0, -1
DRAWS = 2_000
TIED = 1.5  # a verdict for neither output


def majority(labels: Sequence[int]) -> int:
    """What most people say: 1, 2 or TIE; UNDECIDED where two answers are given equally often."""
    ranked = Counter(labels).most_common(2)
    return UNDECIDED if len(ranked) > 1 and ranked[0][1] == ranked[1][1] else ranked[0][0]


def agreement(
    first_order: npt.ArrayLike,
    second_order: npt.ArrayLike,
    labels: Sequence[Sequence[int]],
    instructions: Sequence[str],
) -> dict[str, Any]:
    """The agreement of a judge's verdicts with people's labels.

    The judge's figures are of the `n` pairs on which most people name a winner and both orders have a verdict. A
    verdict for neither output is half right. Pairs of one instruction are not independent: instructions are what is
    drawn.

    Args:
        first_order: (p,) preferences of the judge, shown output_1 first; NaN where it was not asked or gave no verdict.
        second_order: (p,) the same, shown output_2 first.
        labels: p times one or more labels.
        instructions: (p,) what the outputs of each pair answer.

    Returns:
        Counts: pairs, ties (most people call the pair one), undecided (there is no most frequent label), n_failed (a
        pair with a winner lacks a verdict), n, judge_ties (verdicts for neither, of 2 n).
        Fractions, None where there is nothing to say: accuracy_first_order, accuracy_second_order; accuracy (their
        mean); both_correct; consistency (both orders name the same winner); kappa_orders (Cohen's, of the two orders'
        winners); accuracy_if_missing_wrong and accuracy_if_missing_right (of the pairs without verdicts).
        Where pairs have several labels: human_agreement (of two people, a tie is an answer like others);
        human_agreement_on_winners and judge_agreement_on_winners (of two people, or of the judge and one of them, who
        both name a winner; on the same pairs).
        Each fraction but the two bounds has NAME_low and NAME_high.
    """
    gold = np.array([majority(each) for each in labels], dtype=int)
    groups = pd.factorize(np.asarray(instructions, dtype=object))[0]
    winners = np.stack([_winners(first_order), _winners(second_order)])
    decided, answered = gold > 0, ~np.isnan(winners).any(axis=0)
    used = decided & answered
    right = 1 - np.abs(winners[:, used] - gold[used])
    found: dict[str, Any] = {
        "pairs": len(gold),
        "ties": int((gold == TIE).sum()),
        "undecided": int((gold == UNDECIDED).sum()),
        "n_failed": int((decided & ~answered).sum()),
        "n": int(used.sum()),
        "judge_ties": int((winners[:, used] == TIED).sum()),
    }
    same = winners[0, used] == winners[1, used]
    for name, values in (
        ("accuracy_first_order", right[0]),
        ("accuracy_second_order", right[1]),
        ("accuracy", right.mean(axis=0)),
        ("both_correct", right.min(axis=0) == 1),
        ("consistency", same),
    ):
        found |= grouped_mean(name, values, groups[used])
    found |= grouped_kappa("kappa_orders", winners[:, used], groups[used])
    for outcome, value in (("wrong", 0.0), ("right", 1.0)):
        whole = [*right.mean(axis=0), *[value] * found["n_failed"]]
        found[f"accuracy_if_missing_{outcome}"] = float(np.mean(whole)) if whole else None
    return found | _people(labels, winners, answered, groups)


def longer_is_right(lengths_1: npt.ArrayLike, lengths_2: npt.ArrayLike, labels: Sequence[Sequence[int]]) -> Any:
    """The accuracy of one who takes the longer output on sight; equal lengths are half right. None without winners.

    Args:
        lengths_1: (p,) characters of output_1.
        lengths_2: (p,) characters of output_2.
        labels: p times one or more labels.
    """
    gold = np.array([majority(each) for each in labels])
    longer = TIED + 0.5 * np.sign(np.asarray(lengths_2, dtype=float) - np.asarray(lengths_1, dtype=float))
    right = 1 - np.abs(longer - gold)[gold > 0]
    return float(right.mean()) if len(right) else None


def cohen_kappa(tables: np.ndarray) -> np.ndarray:
    """Cohen's kappa (1960, doi:10.1177/001316446002000104) of tables of counts.

    Args:
        tables: (..., k, k) how often one says the row's and the other the column's answer.

    Returns:
        (...) kappa; NaN where both give one answer alone, since chance agrees as often.
    """
    total = tables.sum(axis=(-1, -2))
    with np.errstate(divide="ignore", invalid="ignore"):
        observed = np.trace(tables, axis1=-2, axis2=-1) / total
        chance = (tables.sum(axis=-1) * tables.sum(axis=-2)).sum(axis=-1) / total**2
        return np.where(chance < 1, (observed - chance) / (1 - chance), np.nan)


def grouped_mean(
    name: str, values: npt.ArrayLike, groups: np.ndarray, weights: npt.ArrayLike | None = None
) -> dict[str, float | None]:
    """The mean of values and its 95 % interval over groups, which may be of unequal size.

    Args:
        name: of the figure in the result.
        values: (n,) within [0, 1].
        groups: (n,) numbers from 0; values of one group are not independent.
        weights: (n,) how often each value counts; once by default.

    Returns:
        NAME, NAME_low and NAME_high; None without values.
    """
    x = np.asarray(values, dtype=float)
    if not len(x):
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=float)
    sizes = np.bincount(groups, weights=w)
    seen = sizes > 0
    sums = np.bincount(groups, weights=w * x)
    sizes, sums = sizes[seen], sums[seen]
    mean = float(sums.sum() / sizes.sum())
    # A group moves the mean by its own mean's distance from it, and by its size. Of groups of one size these are the
    # groups' means; of groups of one pair, the values.
    pulls = mean + (sums - sizes * mean) / sizes.mean()
    low, high = mean_intervals(pulls, (min(0.0, pulls.min()), max(1.0, pulls.max())), NEAR)
    return {
        name: mean,
        f"{name}_low": float(min(max(low[0], 0.0), mean)),
        f"{name}_high": float(max(min(high[0], 1.0), mean)),
    }


def grouped_kappa(name: str, winners: np.ndarray, groups: np.ndarray) -> dict[str, float | None]:
    """Kappa of (2, n) winners in two orders, and its 95 % interval by the Bayesian bootstrap over groups (Rubin 1981).

    A quarter of an observation in each cell of the two outputs is why it does not collapse where all verdicts agree.

    Args:
        name: of the figure in the result.
        winners: (2, n) 1, 2 or TIED.
        groups: (n,) numbers from 0.

    Returns:
        NAME, NAME_low and NAME_high; None without winners, or where both orders name one output alone.
    """
    nothing: dict[str, float | None] = {name: None, f"{name}_low": None, f"{name}_high": None}
    if not winners.size:
        return nothing
    answers = np.array([1, TIED, 2])
    k, winner = len(answers), [0, 2]
    one, other = (np.searchsorted(answers, each) for each in winners)
    flat = np.zeros((groups.max() + 1, k * k))
    np.add.at(flat, (groups, one * k + other), 1.0)
    flat = flat[flat.sum(axis=1) > 0]
    kappa = float(cohen_kappa(flat.sum(axis=0).reshape(k, k)))
    if np.isnan(kappa):
        return nothing
    kinds, times = np.unique(flat, axis=0, return_counts=True)
    extra = np.zeros((4, k * k))
    extra[range(4), [row * k + column for row in winner for column in winner]] = flat.sum(axis=1).mean()
    weights = np.random.default_rng(0).gamma([*times, *[0.25] * 4], size=(DRAWS, len(times) + 4))
    drawn = cohen_kappa((weights @ np.concatenate([kinds, extra])).reshape(-1, k, k))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {name: kappa, f"{name}_low": float(min(low, kappa)), f"{name}_high": float(max(high, kappa))}


def _winners(preference: npt.ArrayLike) -> np.ndarray:
    """(p,) 1, 2 or TIED; NaN where there is no verdict."""
    return TIED + 0.5 * np.sign(valid_preferences(preference) - TIED)


def _people(
    labels: Sequence[Sequence[int]], winners: np.ndarray, answered: np.ndarray, groups: np.ndarray
) -> dict[str, float | None]:
    """What people agree on, and the judge with one of them; empty where no pair has several labels."""
    several = [i for i, each in enumerate(labels) if len(each) > 1]
    if not several:
        return {}
    named = {i: [label for label in labels[i] if label != TIE] for i in several}
    compared = [i for i in several if len(named[i]) > 1 and answered[i]]
    judged = [np.mean([1 - np.abs(winners[:, i] - label) for label in named[i]]) for i in compared]
    return {
        **grouped_mean("human_agreement", [_alike(labels[i]) for i in several], groups[several]),
        **grouped_mean("human_agreement_on_winners", [_alike(named[i]) for i in compared], groups[compared]),
        **grouped_mean("judge_agreement_on_winners", judged, groups[compared]),
    }


def _alike(labels: Sequence[int]) -> float:
    """The share of pairs of people who say the same."""
    return float(np.mean([one == other for one, other in combinations(labels, 2)]))
