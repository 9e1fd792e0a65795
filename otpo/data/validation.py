"""Which rows are held out for validation: a prompt's rows stay together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from otpo.data.sampler import permutation
from otpo.errors import UserError
from otpo.records import TokenCompletion, TokenPair

T = TypeVar("T", TokenPair, TokenCompletion)


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
    for number in permutation(len(members), seed, 0):
        if len(held) + len(members[number]) <= wanted:
            held.update(members[number])
    if not held or len(held) == len(items):
        raise UserError(
            f"cannot split {len(items)} rows with {len(members)} different prompts into training and {wanted} "
            "validation rows: a prompt's rows stay together, and neither side may be empty"
        )
    train = [item for index, item in enumerate(items) if index not in held]
    return train, [items[index] for index in sorted(held)]
