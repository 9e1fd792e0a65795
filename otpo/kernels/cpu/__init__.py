"""Everything that exists because training on a CPU must be fast, behind one switch, `uses_cpu_kernels`.

`attention` computes attention as matrix products over blocks, `buckets` pads products to few sizes, `allocator` sets up
glibc's malloc; `otpo.kernels.mixed_precision` and `otpo.models.logprobs` ask the same switch.
"""

from __future__ import annotations

from torch import Tensor


def uses_cpu_kernels(tensor: Tensor) -> bool:
    """Whether to compute with a tensor in the ways that are fast on a CPU."""
    return tensor.device.type == "cpu"
