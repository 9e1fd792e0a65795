"""Few sizes of products, and only where they pay."""

import pytest
import torch

from otpo.kernels.cpu.buckets import GRAIN, bucket_size

LOW = torch.empty(0, dtype=torch.bfloat16)


def test_sizes_hold_what_they_are_asked_for_and_little_more():
    for count in range(5000):
        size = bucket_size(count, LOW)
        assert count <= size < count + max(GRAIN, 1 + count / 32) and size % GRAIN == 0
        assert bucket_size(size, LOW) == size, "a size is its own"


def test_there_are_few_sizes_for_each_doubling():
    assert len({bucket_size(count, LOW) for count in range(1, 513)}) == 32
    for low in (512, 1024, 2048, 4096):
        assert len({bucket_size(count, LOW) for count in range(low + 1, 2 * low + 1)}) == 32


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float32, "cpu"), (torch.float64, "cpu"), (torch.bfloat16, "meta")]
)
def test_nothing_is_padded_where_nothing_is_compiled(dtype, device):
    assert bucket_size(1001, torch.empty(0, dtype=dtype, device=device)) == 1001
