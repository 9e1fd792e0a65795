"""How the items of a global batch are dealt to workers and micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

TOKENS = {"cpu": 2048, "cuda": 16384}
"""Default tokens of a micro-batch by device: enough for large products; more would only take memory."""


def micro_batches(
    tokens: Sequence[int], *, size: int, budget: int | None = None, rank: int, world: int
) -> list[list[int]]:
    """Which items of a global batch this rank computes, and in which micro-batches.

    Items of similar length share a micro-batch, so that architectures without shared prompts pad little. Every rank
    gets the same number of micro-batches, empty ones if there are too few, because all ranks must enter every
    collective.

    Args:
        tokens: of each item.
        size: items in a micro-batch, at most.
        budget: tokens in a micro-batch, at most; an item with more has one of its own. None: any number.
        rank, world: this worker's number, and how many there are.

    Returns:
        Lists of indices into `tokens`; over all ranks each index appears exactly once.
    """
    order = sorted(range(len(tokens)), key=lambda i: (-tokens[i], i))
    # a batch smaller than world * size is spread over the ranks rather than given to the first
    size = max(1, min(size, math.ceil(len(order) / world)))
    groups: list[list[int]] = []
    for index in order:
        full = not groups or len(groups[-1]) == size
        if full or (budget is not None and sum(tokens[i] for i in groups[-1]) + tokens[index] > budget):
            groups.append([])
        groups[-1].append(index)
    mine = groups[rank::world]
    return mine + [[]] * (math.ceil(len(groups) / world) - len(mine))
