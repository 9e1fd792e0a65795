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


def of_all_ranks(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The values of all ranks, in their order. All ranks must call it.

    Args:
        group: that they are sent over; in a thread beside training it must be another than training's.
    """
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def from_rank_0(value: T | None, group: dist.ProcessGroup | None = None) -> T:
    """Rank 0's value on every rank: what it sees on shared storage holds for all, since others may see an older state.

    All ranks must call it; what the others give is not looked at. `group` is as in `of_all_ranks`.
    """
    values: list[Any] = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, group=group)
    return values[0]
