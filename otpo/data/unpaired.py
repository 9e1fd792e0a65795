"""Labelled completions (KTO): split from pairs, matched with other prompts' completions, and laid out as batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from otpo.data.collate import collate_completions
from otpo.data.sampler import next_indices
from otpo.data.token_file import LazyItems, Prompts, column
from otpo.errors import UserError
from otpo.records import PromptCompletions, SequenceBatch, TokenCompletion, TokenPair


class SplitPairs(LazyItems[TokenCompletion]):
    """Each pair as two completions, of which the chosen one is desirable (TRL's `unpair_preference_dataset`)."""

    def __init__(self, pairs: Sequence[TokenPair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return 2 * len(self.pairs)

    def item(self, index: int) -> TokenCompletion:
        """See `LazyItems`."""
        pair = self.pairs[index // 2]
        rejected = bool(index % 2)
        return TokenCompletion(
            pair.row, pair.prompt_ids, pair.rejected_ids if rejected else pair.chosen_ids, not rejected
        )


def split_pairs(pairs: Sequence[TokenPair]) -> list[TokenCompletion]:
    """The completions of `SplitPairs` as a list."""
    return list(SplitPairs(pairs))


def mismatched(items: Sequence[TokenCompletion], *, seed: int, max_length: int | None = None) -> list[TokenCompletion]:
    """The rows of `each_mismatched` as a list."""
    return list(each_mismatched(items, seed=seed, max_length=max_length))


def each_mismatched(
    items: Sequence[TokenCompletion], *, seed: int, max_length: int | None = None
) -> Iterator[TokenCompletion]:
    """Give each row a completion that belongs to another prompt: what KTO estimates its KL term from.

    Prompts are put in a seeded order, the rows of a prompt beside each other, and completions are rolled by as many
    rows as the most frequent prompt has: where each prompt stands once, each row gets its predecessor's completion. So
    every completion is used once; only where one prompt has more than half of the rows, others' are used again. The
    completion of another prompt may still say the same as the row's own.

    TRL rolls by one inside groups of `per_device_train_batch_size` rows in the order of the file, where a row may meet
    another completion of its own prompt. Here the pairing belongs to the data: batches and workers do not change it,
    and the reference's log-probabilities are computed once.

    Args:
        items: rows of at least two prompts.
        seed: of the order.
        max_length: tokens of the prompt with the other completion, which is cut at its end; prompts must be shorter.

    Raises:
        UserError: all rows have the same prompt.
    """
    numbers: dict[int, int] = {}
    prompts = np.fromiter(
        (numbers.setdefault(hash(tuple(item.prompt_ids)), len(numbers)) for item in items), np.int64, len(items)
    )
    if len(numbers) < 2:
        raise UserError(
            f"KTO matches each prompt with a completion of another prompt: expected rows of at least two prompts, found"
            f" {len(items)} rows of {len(numbers)}. Give more data; if these are the validation rows, raise"
            " data.validation or set it to 0."
        )
    for item, other in zip(items, _others(prompts, seed), strict=True):
        room = None if max_length is None else max_length - len(item.prompt_ids)
        yield replace(item, mismatched_ids=items[other].completion_ids[:room])


def _others(prompts: np.ndarray, seed: int) -> np.ndarray:
    """(n,) for each row, the row whose completion it is given.

    Args:
        prompts: (n,) the number of each row's prompt, in the order of their first rows.
    """
    groups = next_indices(int(prompts.max()) + 1, seed=seed, consumed=0, count=int(prompts.max()) + 1)
    place = np.empty(len(groups), np.int64)
    place[groups] = np.arange(len(groups))  # of each prompt in the seeded order
    order = np.argsort(place[prompts], kind="stable")
    sizes = np.bincount(place[prompts])
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    # `roll` places back; the remainder keeps a prompt with more than half of the rows off its own rows
    back = (sizes.max() - 1 - (np.arange(len(order)) - starts)) % (len(order) - np.repeat(sizes, sizes))
    others = np.empty_like(order)
    others[order] = order[starts - 1 - back]
    return others


def unpaired_prompts(items: Sequence[TokenCompletion]) -> Prompts:
    """What frozen models are asked about labelled completions: each and its mismatched one, with its `cache_key`."""

    def prompt(item: TokenCompletion) -> PromptCompletions:
        completions = (item.completion_ids, item.mismatched_ids or [])
        return PromptCompletions(cache_key(item.row, item.label), item.prompt_ids, completions)

    rows, labels = column(items, "row"), column(items, "label")
    return Prompts(items, prompt, np.where(rows >= 0, 2 * rows + (labels == 1), -1))


def cache_key(row: int, label: bool | None) -> int:
    """Identifies a labelled completion: a pair makes two from one data row. -1 for padding rows."""
    return 2 * row + bool(label) if row >= 0 else -1


@dataclass(kw_only=True)
class UnpairedBatch(SequenceBatch):
    """B labelled completions.

    Attributes:
        labels: (B,) bool, True for desirable ones.
        keys: the `cache_key` of each row.
        mismatched: the same prompts with completions of other ones.
    """

    labels: Tensor
    keys: tuple[int, ...]
    mismatched: SequenceBatch

    def to(self, device: torch.device | str) -> UnpairedBatch:
        """The batch on a device."""
        moved = super().to(device)
        assert isinstance(moved, UnpairedBatch)
        return replace(moved, mismatched=self.mismatched.to(device))


def collate_unpaired(items: Sequence[TokenCompletion]) -> UnpairedBatch:
    """Lay out B labelled completions with their mismatched ones, each prompt before either."""
    others = [replace(item, completion_ids=item.mismatched_ids or []) for item in items]
    return UnpairedBatch(
        **vars(collate_completions(items)),
        labels=torch.tensor([bool(item.label) for item in items]),
        keys=tuple(cache_key(item.row, item.label) for item in items),
        mismatched=collate_completions(others),
    )
