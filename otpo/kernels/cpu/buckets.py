"""Few sizes of matrix products on a CPU, where oneDNN compiles each product of a size that is new to it.

Compiling takes as long as a large product itself, and a batch hardly ever has as many tokens as one before it. Filled
up to few sizes it has. Fewer would be compiled even less, but what fills up is computed too.
"""

from __future__ import annotations

from torch import Tensor

GRAIN = 16  # sizes are multiples of it


def filled(count: int, like: Tensor) -> int:
    """How many tokens to compute with in place of `count`, where `like` is a tensor that they are multiplied with.

    On a CPU, in less than float32 (whose products MKL does, which compiles none), the least of the sizes that holds
    them: multiples of 16, and beyond 512 thirty-two for each doubling. Else `count`.
    """
    if like.device.type != "cpu" or like.dtype.itemsize >= 4:
        return count
    grain = max(GRAIN, 1 << max(0, (count - 1).bit_length() - 6))
    return -(-count // grain) * grain
