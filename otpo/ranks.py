"""What the ranks of a process group tell each other; alone, a process is rank 0 of one."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait until all ranks are here."""
    if dist.is_initialized():
        dist.barrier()


def of_all_ranks(value: T) -> list[T]:
    """The values of all ranks, in their order. All ranks must call it."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank_0(value: T | None) -> T:
    """Rank 0's value on every rank: what it sees on shared storage holds for all, since others may see an older state.

    All ranks must call it; what the others give is not looked at.
    """
    values: list[Any] = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]
