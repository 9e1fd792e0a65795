"""Which rows are held out, and the order of the others in training: functions of a seed, so that they can be redone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from otpo.errors import UserError
from otpo.records import TokenCompletion, TokenPair

T = TypeVar("T", TokenPair, TokenCompletion)


def next_indices(n: int, *, seed: int, consumed: int, count: int) -> list[int]:
    """The next `count` indices into n items after `consumed` ones: the whole state of the sampler is that number.

    Epoch e is a permutation seeded by (seed, e), and epochs follow one another without a gap, so any slicing of the
    stream, on any number of workers and after any restart, gives the same items. The permutation sorts raw Philox
    words, which do not change with the version of numpy.
    """
    if n < 1 or seed < 0 or consumed < 0 or count < 0:
        raise ValueError(f"expected n > 0, the others >= 0; found {n=}, {seed=}, {consumed=}, {count=}")
    first, last = consumed // n, (consumed + count - 1) // n
    epochs = [_permutation(n, seed, epoch) for epoch in range(first, last + 1)]
    if not epochs:
        return []
    return np.concatenate(epochs)[consumed - first * n :][:count].tolist()


def split_validation(
    items: Sequence[T], *, fraction: float | None = None, count: int | None = None, seed: int
) -> tuple[list[T], list[T]]:
    """Split items into (train, validation) by prompt: no prompt is on both sides.

    Prompts are taken in a seeded random order as long as all their items fit into the wanted number, so the validation
    side can be a little smaller than asked for. Both sides keep the items' order.

    Args:
        items: pairs or completions.
        fraction: of the items, in (0, 1); or
        count: number of items.
        seed: of the order.

    Raises:
        UserError: one of the sides would be empty.
    """
    if (fraction is None) == (count is None):
        raise ValueError("give either fraction or count")
    wanted = count if count is not None else round(len(items) * (fraction or 0.0))
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(tuple(item.prompt_ids), []).append(index)
    members = list(groups.values())
    held: set[int] = set()
    for number in _permutation(len(members), seed, 0):
        if len(held) + len(members[number]) <= wanted:
            held.update(members[number])
    if not held or len(held) == len(items):
        raise UserError(
            f"cannot split {len(items)} rows with {len(members)} different prompts into training and {wanted} "
            "validation rows: a prompt's rows stay together, and neither side may be empty. Set data.validation to a"
            " number of rows that fits, or to 0 to hold none out."
        )
    train = [item for index, item in enumerate(items) if index not in held]
    return train, [items[index] for index in sorted(held)]


def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of n items that depends on (seed, epoch) alone. It sorts raw Philox words: numpy keeps those."""
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(words, kind="stable")
