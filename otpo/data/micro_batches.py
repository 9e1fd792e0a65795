"""How the items of a global batch are dealt to workers and micro-batches.

On a CPU, and where sequences are padded, items of similar length share a micro-batch. A GPU that pads nothing gets
micro-batches of equally many tokens instead, as few as its memory allows, so that all ranks finish together.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

TOKENS = {"cpu": 2048, "cuda": 16384}
"""Default tokens of a micro-batch by device: enough for large products; more would only take memory."""


SIZES: dict[str, int | None] = {"cpu": 4, "cuda": None}
"""Default items of a micro-batch by device; None: as many as its tokens allow."""


def micro_batches(
    tokens: Sequence[int], *, size: int | None, budget: int | None = None, rank: int, world: int
) -> list[list[int]]:
    """Which items of a global batch this rank computes, and in which micro-batches.

    With a size, items of similar length share a micro-batch, so that architectures without shared prompts pad little.
    With a budget alone, micro-batches are as few as it allows, and of nearly equally many tokens. Every rank gets the
    same number of micro-batches, empty ones if there are too few, because all ranks must enter every collective.

    Args:
        tokens: of each item.
        size: items in a micro-batch, at most. None: any number.
        budget: tokens in a micro-batch, at most; an item with more has one of its own. None: any number.
        rank, world: this worker's number, and how many there are.

    Returns:
        Lists of indices into `tokens`; over all ranks each index appears exactly once.
    """
    if size is None and budget is not None:
        return _balanced(tokens, budget, rank, world)
    order = sorted(range(len(tokens)), key=lambda i: (-tokens[i], i))
    # a batch smaller than world * size is spread over the ranks rather than given to the first
    even = math.ceil(len(order) / world)
    size = max(1, even if size is None else min(size, even))
    groups: list[list[int]] = []
    for index in order:
        full = not groups or len(groups[-1]) == size
        if full or (budget is not None and sum(tokens[i] for i in groups[-1]) + tokens[index] > budget):
            groups.append([])
        groups[-1].append(index)
    return _of_rank(groups, rank, world)


def _balanced(tokens: Sequence[int], budget: int, rank: int, world: int) -> list[list[int]]:
    """The longest item goes to the micro-batch with the fewest tokens, then the next (longest processing time first).

    Micro-batches that ranks compute at the same time are neighbours in size.
    """
    order = sorted(range(len(tokens)), key=lambda i: (-tokens[i], i))
    count = world * max(1, math.ceil(sum(tokens) / (budget * world)))
    while (groups := _filled(order, tokens, count, budget)) is None:
        count += world * max(1, count // (50 * world))
    groups.sort(key=lambda group: -sum(tokens[i] for i in group))
    return _of_rank([group for group in groups if group], rank, world)


def _filled(order: Sequence[int], tokens: Sequence[int], count: int, budget: int) -> list[list[int]] | None:
    """The items in this many groups; None if a group of several items would exceed the budget."""
    groups: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for index in order:
        total, number = heapq.heappop(heap)
        if groups[number] and total + tokens[index] > budget:
            return None
        groups[number].append(index)
        heapq.heappush(heap, (total + tokens[index], number))
    return groups


def waiting(tokens: Sequence[int], ranks: Sequence[Sequence[Sequence[int]]]) -> float:
    """The fraction of all ranks' time in which they wait for the longest micro-batch, if time goes by tokens.

    Args:
        ranks: each rank's micro-batches of a step.
    """
    rounds = [[sum(tokens[i] for i in group) for group in groups] for groups in zip(*ranks, strict=True)]
    longest = sum(max(totals) for totals in rounds)
    return 1 - sum(map(sum, rounds)) / (len(ranks) * longest) if longest else 0.0


def _of_rank(groups: list[list[int]], rank: int, world: int) -> list[list[int]]:
    mine = groups[rank::world]
    return mine + [[]] * (math.ceil(len(groups) / world) - len(mine))
