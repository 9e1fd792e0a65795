"""How often 95 % intervals hold the truth, and tests of no difference reject it: boards are drawn from a known truth.

    make bench ARGS="coverage --boards 4300"

A board's true win rate is drawn around the one in the heading, its odds within a factor of e^0.5: where all verdicts
are 0 or 1 and the truth is held fixed, no interval can have the same coverage at every truth, and the truth that is
picked decides. Prompts differ in difficulty.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence

import numpy as np

from eval.stats.intervals import HALF, NEAR, mean_intervals

RATES = (0.01, 0.03, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 0.99)
SIZES = (100, 800)
Draw = Callable[[np.random.Generator, np.ndarray], np.ndarray]


def _binary(rng: np.random.Generator, chance: np.ndarray) -> np.ndarray:
    return (rng.random(chance.shape) < chance).astype(float)


def _graded(concentration: float) -> Draw:
    def draw(rng: np.random.Generator, chance: np.ndarray) -> np.ndarray:
        a, b = (np.maximum(concentration * side, 1e-9) for side in (chance, 1 - chance))
        with np.errstate(invalid="ignore"):
            return np.nan_to_num(rng.beta(a, b), nan=0.0)

    return draw


def _nearly_unanimous(rng: np.random.Generator, chance: np.ndarray) -> np.ndarray:
    return np.abs(_binary(rng, chance) - 1e-9 * rng.random(chance.shape))


def _both_orders(rng: np.random.Generator, chance: np.ndarray) -> np.ndarray:
    """A judge who takes the first answer on one prompt in five, asked in both orders."""
    biased = rng.random(chance.shape) < 0.2
    return np.where(biased, 0.5, (_binary(rng, chance) + _binary(rng, chance)) / 2)


def _samples(rng: np.random.Generator, chance: np.ndarray) -> np.ndarray:
    return rng.binomial(4, chance) / 4


KINDS: dict[str, Draw] = {
    "wins and losses": _binary,
    "near 0 and 1, as of GPT-4": _graded(0.3),
    "graded": _graded(2.0),
    "nearly unanimous": _nearly_unanimous,
    "both orders": _both_orders,
    "mean of 4 samples": _samples,
}


def chances(rng: np.random.Generator, rate: float, boards: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """(boards,) true win rates around `rate`, and (boards, n) those of their prompts."""
    odds = rate / (1 - rate) * np.exp(rng.uniform(-0.5, 0.5, boards))
    truth = odds / (1 + odds)
    a, b = (np.broadcast_to(5 * side[:, None], (boards, n)) for side in (truth, 1 - truth))
    return truth, rng.beta(a, b)


def covered(kind: str, n: int, rate: float, boards: int, seed: int = 0) -> float:
    """Percent of boards whose interval of the win rate holds its truth."""
    rng = np.random.default_rng(seed)
    truth, prompts = chances(rng, rate, boards, n)
    values = KINDS[kind](rng, prompts)
    if kind == "both orders":
        truth = 0.8 * truth + 0.1
    low, high = mean_intervals(values, (0.0, 1.0), NEAR)
    return float(100 * np.mean((low <= truth) & (truth <= high)))


def rejected(kind: str, n: int, rate: float, boards: int, seed: int = 0) -> float:
    """Percent of boards on which two equally good models are called different."""
    rng = np.random.default_rng(seed)
    _, prompts = chances(rng, rate, boards, n)
    low, high = mean_intervals(KINDS[kind](rng, prompts) - KINDS[kind](rng, prompts), (-1.0, 1.0), HALF)
    return float(100 * np.mean((low > 0) | (high < 0)))


def table(measure: Callable[..., float], boards: int, rates: Sequence[float]) -> list[tuple[str, int, list[float]]]:
    """(kind of verdicts, prompts, percent at each rate)."""
    return [(kind, n, [measure(kind, n, rate, boards) for rate in rates]) for kind in KINDS for n in SIZES]


def main(arguments: list[str]) -> None:
    """Print both tables in Markdown, and one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--boards", type=int, default=4300)
    boards, began = parser.parse_args(arguments).boards, time.perf_counter()
    found = {}
    for name, measure, rates in (("covered", covered, RATES), ("rejected", rejected, RATES[:5])):
        found[name] = table(measure, boards, rates)
        print(f"| verdicts | prompts | {' | '.join(f'{100 * rate:g} %' for rate in rates)} |")
        print("| --- " * (2 + len(rates)) + "|")
        for kind, n, row in found[name]:
            print(f"| {kind} | {n} | {' | '.join(f'{value:.1f}' for value in row)} |", flush=True)
    print(
        json.dumps({"benchmark": "coverage", "boards": boards, "seconds": round(time.perf_counter() - began), **found})
    )


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
