"""Pads matrix products to a few bucket sizes, so that oneDNN compiles each product once.

oneDNN compiles a kernel for every new size of a low-precision product, which takes as long as a large product, and the
number of tokens differs from batch to batch. Coarser buckets would need fewer kernels, but padding is computed too.
"""

from __future__ import annotations

from torch import Tensor

from otpo.kernels.cpu import uses_cpu_kernels

GRAIN = 16  # bucket sizes are multiples of it


def bucket_size(count: int, like: Tensor) -> int:
    """How many tokens to compute with when there are `count`.

    Low-precision products on a CPU are padded to the next multiple of 16, above 512 to the next of 32 sizes for each
    doubling. Other products are not padded: MKL, which computes those in float32, does not compile.

    Args:
        like: a tensor that the tokens are multiplied with; its device and dtype decide.
    """
    if not uses_cpu_kernels(like) or like.dtype.itemsize >= 4:
        return count
    grain = max(GRAIN, 1 << max(0, (count - 1).bit_length() - 6))
    return -(-count // grain) * grain
