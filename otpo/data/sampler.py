"""The order of rows in training: a function of the seed and the number of rows consumed, so that it can be resumed."""

from __future__ import annotations

import numpy as np


def next_indices(n: int, *, seed: int, consumed: int, count: int) -> list[int]:
    """The next `count` indices into n items after `consumed` ones: the whole state of the sampler is that number.

    Epoch e is a permutation seeded by (seed, e), and epochs follow one another without a gap, so any slicing of the
    stream, on any number of workers and after any restart, gives the same items. The permutation sorts raw Philox
    words, which do not change with the version of numpy.
    """
    if n < 1 or seed < 0 or consumed < 0 or count < 0:
        raise ValueError(f"expected n > 0, the others >= 0; found {n=}, {seed=}, {consumed=}, {count=}")
    first, last = consumed // n, (consumed + count - 1) // n
    epochs = [permutation(n, seed, epoch) for epoch in range(first, last + 1)]
    if not epochs:
        return []
    return np.concatenate(epochs)[consumed - first * n :][:count].tolist()


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of n items that depends on (seed, epoch) alone. It sorts raw Philox words: numpy keeps those."""
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(words, kind="stable")
