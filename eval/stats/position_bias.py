"""Position bias: whether the judge prefers whichever output it is shown first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from eval.stats.intervals import NEAR, mean_intervals
from eval.stats.win_rate import valid_preferences


@dataclass(frozen=True)
class PositionBias:
    """How often the judge prefers the output that is shown first. Percentages; None where nothing can be said.

    Attributes:
        first_share: preference for the output shown first, if both outputs stand there equally often; 50 is no bias.
        low: lower end of its 95 % interval.
        high: upper end of its 95 % interval.
        shown_first: win rate of the model where its output is shown first.
        shown_second: win rate of the model where its output is shown second.
        both_orders: whether each prompt was asked in both orders, so that the bias cancels out of the win rate.
    """

    first_share: float | None = None
    low: float | None = None
    high: float | None = None
    shown_first: float | None = None
    shown_second: float | None = None
    both_orders: bool = False

    @property
    def found(self) -> bool:
        """Whether 50 is outside the interval."""
        return self.low is not None and self.high is not None and not self.low <= 50 <= self.high

    @property
    def place(self) -> str:
        """The place that is preferred, if one is."""
        return "first" if self.first_share is None or self.first_share >= 50 else "second"


def position_bias(verdicts: pd.DataFrame) -> PositionBias:
    """The bias of the verdicts on one model.

    Asked in both orders, a prompt tells it by itself. Asked in one, drawn by lot, the prompts with the model's output
    first are compared with the others: the model is the same, so without a bias it wins as often.

    Args:
        verdicts: columns index, preference and order ("model_first", "reference_first", or "none" where outputs are not
            compared); `key` where identical outputs, which are not shown to the judge, are to be left out.
    """
    if "order" not in verdicts:
        return PositionBias()
    asked = verdicts[verdicts["order"].isin(["model_first", "reference_first"])]
    if "key" in asked:
        asked = asked[asked["key"] != ""]
    chance = pd.Series(100 * (valid_preferences(asked["preference"]) - 1), index=asked.index)
    first = asked["order"] == "model_first"
    ours, theirs = chance[first].dropna().to_numpy(), chance[~first].dropna().to_numpy()
    if not len(ours) or not len(theirs):
        return PositionBias(
            shown_first=float(ours.mean()) if len(ours) else None,
            shown_second=float(theirs.mean()) if len(theirs) else None,
        )
    shown_first, shown_second = float(ours.mean()), float(theirs.mean())
    prompts = pd.DataFrame({"index": asked["index"], "share": chance.where(first, 100 - chance)}).groupby("index")
    if both := bool((prompts.size() > 1).mean() > 0.5):
        pairs = prompts["share"].mean().where(prompts["share"].count() > 1).dropna().to_numpy()
        if not len(pairs):
            return PositionBias(shown_first=shown_first, shown_second=shown_second, both_orders=True)
        low, high = mean_intervals(pairs, (0.0, 100.0), NEAR)
        share, ends = float(pairs.mean()), (float(low[0]), float(high[0]))
    else:
        # Newcombe's way (1998, doi:10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I): the ends of a
        # difference from those of its two parts.
        share = 50 + (shown_first - shown_second) / 2
        parts = np.full((2, max(len(ours), len(theirs))), np.nan)
        parts[0, : len(ours)], parts[1, : len(theirs)] = ours, theirs
        (our_low, their_low), (our_high, their_high) = mean_intervals(parts, (0.0, 100.0), NEAR)
        below = float(np.hypot(shown_first - our_low, their_high - shown_second)) / 2
        above = float(np.hypot(our_high - shown_first, shown_second - their_low)) / 2
        ends = (max(0.0, share - below), min(100.0, share + above))
    return PositionBias(share, *ends, shown_first, shown_second, both)


def bias_note(bias: PositionBias) -> str:
    """What to know about a win rate because of the judge's bias; empty where there is nothing."""
    alone = bias.shown_first if bias.shown_second is None else bias.shown_second
    if bias.first_share is None:
        if alone is None or bias.both_orders:
            return ""
        place = "second" if bias.shown_first is None else "first"
        return (
            f"its outputs always stood {place}, so a judge who prefers a place cannot be told from one who prefers the "
            "model: ask in both orders"
        )
    if not bias.found:
        return ""
    if bias.both_orders:
        return (
            f"the judge prefers the output shown {bias.place} (P(first) {bias.first_share:.1f}%), which asking in both "
            "orders cancels out"
        )
    assert bias.shown_first is not None and bias.shown_second is not None
    alike = (bias.shown_first + bias.shown_second) / 2
    return (
        f"the judge prefers the output shown {bias.place}: the model wins {bias.shown_first:.1f}% shown first and "
        f"{bias.shown_second:.1f}% shown second, {alike:.1f}% if both count alike: ask in both orders"
    )
