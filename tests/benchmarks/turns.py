"""Sides take turns of a few steps on the same pairs: what else the machine does meets all of them alike."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

TURN = 4  # steps that a side takes on end


def turns(names: Sequence[str], steps: int, turn: int = TURN) -> Iterator[tuple[str, range]]:
    """Whose turn it is, and the numbers of its steps. Who begins changes from one turn to the next."""
    for number, start in enumerate(range(0, steps, turn)):
        for name in names[:: 1 if number % 2 else -1]:
            yield name, range(start, min(start + turn, steps))


def counted(steps: int, turn: int = TURN) -> list[int]:
    """Numbers of the steps whose seconds count: neither of the first quarter nor the first of a longer turn.

    The first finds the caches full of the other sides' data, as no training does.
    """
    return [number for number in range(steps // 4, steps) if turn == 1 or number % turn]


def ratios(one: Sequence[float], other: Sequence[float], numbers: Sequence[int]) -> dict[str, float]:
    """Of the seconds of one side's steps to those of the other's on the same pairs: median and quartiles."""
    low, middle, high = statistics.quantiles([one[number] / other[number] for number in numbers], n=4)
    return {"median": middle, "low": low, "high": high}
