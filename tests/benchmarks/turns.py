"""Sides take turns of a few steps on the same pairs, so that other load on the machine slows all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

TURN = 4  # steps that a side takes in a row


def turns(names: Sequence[str], steps: int, turn: int = TURN) -> Iterator[tuple[str, range]]:
    """The side of each turn, and the numbers of its steps. Another side begins each round."""
    for number, start in enumerate(range(0, steps, turn)):
        for name in names[:: 1 if number % 2 else -1]:
            yield name, range(start, min(start + turn, steps))


def counted(steps: int, turn: int = TURN) -> list[int]:
    """Numbers of the steps that are counted: none of the first quarter, and not the first of a longer turn.

    The first step of a turn finds the caches full of the other sides' data, which does not happen in training.
    """
    return [number for number in range(steps // 4, steps) if turn == 1 or number % turn]


def ratios(one: Sequence[float], other: Sequence[float], numbers: Sequence[int]) -> dict[str, float]:
    """Ratio of one side's seconds to the other's on the same pairs: median and quartiles over the steps."""
    low, middle, high = statistics.quantiles([one[number] / other[number] for number in numbers], n=4)
    return {"median": middle, "low": low, "high": high}
