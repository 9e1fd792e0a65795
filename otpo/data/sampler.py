"""Which rows are held out, and the order of the others in training: functions of a seed, so that they can be redone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeVar

import numpy as np

from otpo.errors import UserError
from otpo.records import TokenCompletion, TokenPair

T = TypeVar("T", TokenPair, TokenCompletion)


# ---- the order of training ----


def next_indices(
    n: int, *, seed: int, consumed: int, count: int, takes: tuple[tuple[int, int], ...] | None = None
) -> list[int]:
    """The next `count` indices into n items after `consumed` ones: the whole state of the sampler is that number.

    Epoch e is a permutation seeded by (seed, e), and epochs follow one another without a gap, so any slicing of the
    stream, on any number of workers and after any restart, gives the same items. The permutation sorts raw Philox
    words, which do not change with the version of numpy.

    Args:
        n: items; of a mix of data sets, those of one set after those of the one before.
        takes: for a mix, (items, how many of them an epoch takes) of each set. Where an epoch takes more than there
            are, every item comes as often as the others or once more, and those that come once more change with the
            epoch. None: an epoch takes every item once.
    """
    if n < 1 or seed < 0 or consumed < 0 or count < 0:
        raise ValueError(f"expected n > 0, the others >= 0; found {n=}, {seed=}, {consumed=}, {count=}")
    takes = takes or ((n, n),)
    if sum(items for items, _ in takes) != n:
        raise ValueError(f"expected data sets of {n} items together, found {takes}")
    size = sum(taken for _, taken in takes)
    epochs = range(consumed // size, (consumed + count - 1) // size + 1)
    found: list[int] = []
    for epoch in epochs:
        start = epoch * size
        found += _epoch(takes, seed, epoch)[max(0, consumed - start) : consumed + count - start].tolist()
    return found


@lru_cache(maxsize=2)
def _epoch(takes: tuple[tuple[int, int], ...], seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch; kept, because every step of it asks."""
    pool, start = [], 0
    for number, (items, taken) in enumerate(takes, start=1):
        times, more = divmod(taken, items)
        once_more = _permutation(items, seed + number, epoch)[:more] if more else np.zeros(0, np.int64)
        pool.append(start + np.concatenate([np.tile(np.arange(items), times), once_more]))
        start += items
    taken_items = np.concatenate(pool)
    return taken_items[_permutation(len(taken_items), seed, epoch)]


# ---- the parts of a mix of data sets ----


def shares(sizes: Sequence[int], fractions: Sequence[float] | None, *, repeat: bool) -> list[int]:
    """How many items of each data set an epoch takes.

    Args:
        sizes: usable items of each set, above 0.
        fractions: the wanted share of each set, above 0; they are normalised. None: every item once.
        repeat: False takes as many items as there can be without taking one twice (the `first_exhausted` of
            `datasets.interleave_datasets`, and what TRL's `DatasetMixtureConfig` does); True as few as there can be
            with every item taken at least once (`all_exhausted`).
    """
    if fractions is None:
        return list(sizes)
    parts = np.array(fractions, dtype=np.float64) / sum(fractions)
    totals = np.array(sizes) / parts
    total = totals.max() if repeat else totals.min()
    return [int(count) for count in np.maximum(1, np.round(total * parts))]


def spread(size: int, count: int) -> np.ndarray:
    """`count` of `size` items, in their order; drawn evenly, and the same for every seed of a run."""
    return np.sort(_permutation(size, 0, 0)[:count])


# ---- held-out rows ----


def held_out(
    prompts: np.ndarray,
    *,
    fraction: float | None = None,
    count: int | None = None,
    seed: int,
    sets: np.ndarray | None = None,
) -> np.ndarray:
    """(n,) bool: which of n items are held out for validation. No prompt is on both sides.

    Prompts are taken in a seeded random order as long as all their items fit into the wanted number, so the validation
    side can be a little smaller than asked for. In a mix of data sets each has its own wanted number, in proportion to
    its items, and a prompt that is in several sets is held out of all of them or of none.

    Args:
        prompts: (n,) equal for items with equal prompts.
        fraction: of the items, in (0, 1); or
        count: number of items.
        seed: of the order.
        sets: (n,) int, the number of each item's data set.

    Raises:
        UserError: one of the sides would be empty.
    """
    if (fraction is None) == (count is None):
        raise ValueError("give either fraction or count")
    sets = np.zeros(len(prompts), np.int64) if sets is None else sets
    sizes = np.bincount(sets)
    fraction = count / max(1, len(prompts)) if count is not None else fraction
    wanted = np.array([round(int(size) * (fraction or 0.0)) for size in sizes])
    groups = _numbered(prompts)
    members = np.bincount(groups * len(sizes) + sets, minlength=(groups.max(initial=-1) + 1) * len(sizes))
    members = members.reshape(-1, len(sizes))
    held, taken = np.zeros(len(members), dtype=bool), np.zeros_like(wanted)
    for number in _permutation(len(members), seed, 0):
        if (taken + members[number] <= wanted).all():
            taken += members[number]
            held[number] = True
            if (taken == wanted).all():
                break
    if not held.any() or held.all():
        raise UserError(
            f"cannot split {len(prompts)} rows with {len(members)} different prompts into training and {wanted.sum()} "
            "validation rows: a prompt's rows stay together, and neither side may be empty. Set data.validation to a"
            " number of rows that fits, or to 0 to hold none out."
        )
    return held[groups]


def split_validation(
    items: Sequence[T], *, fraction: float | None = None, count: int | None = None, seed: int
) -> tuple[list[T], list[T]]:
    """Split items into (train, validation) by `held_out`. Both sides keep the items' order.

    Raises:
        UserError: one of the sides would be empty.
    """
    numbers: dict[tuple[int, ...], int] = {}
    prompts = np.array([numbers.setdefault(tuple(item.prompt_ids), len(numbers)) for item in items], dtype=np.int64)
    held = held_out(prompts, fraction=fraction, count=count, seed=seed)
    train, validation = ([items[index] for index in np.flatnonzero(side)] for side in (~held, held))
    return train, validation


def _numbered(values: np.ndarray) -> np.ndarray:
    """(n,) the number of each value among the different ones, in the order of their first appearance."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    number = np.empty_like(first)
    number[np.argsort(first, kind="stable")] = np.arange(len(first))
    return number[inverse]


def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of n items that depends on (seed, epoch) alone. It sorts raw Philox words: numpy keeps those."""
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(words, kind="stable")
