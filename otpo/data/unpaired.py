"""Labelled completions (KTO): split from pairs, matched with other prompts' completions, and laid out as batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from otpo.data.collate import collate_completions
from otpo.data.sampler import next_indices
from otpo.errors import UserError
from otpo.records import PromptCompletions, SequenceBatch, TokenCompletion, TokenPair


def split_pairs(pairs: Sequence[TokenPair]) -> list[TokenCompletion]:
    """Each pair as two completions, of which the chosen one is desirable (TRL's `unpair_preference_dataset`)."""
    return [
        TokenCompletion(pair.row, pair.prompt_ids, ids, label)
        for pair in pairs
        for ids, label in ((pair.chosen_ids, True), (pair.rejected_ids, False))
    ]


def mismatched(items: Sequence[TokenCompletion], *, seed: int, max_length: int | None = None) -> list[TokenCompletion]:
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
    members: dict[tuple[int, ...], list[int]] = {}
    for index, item in enumerate(items):
        members.setdefault(tuple(item.prompt_ids), []).append(index)
    groups = list(members.values())
    if len(groups) < 2:
        raise UserError(
            f"KTO matches each prompt with a completion of another prompt: expected rows of at least two prompts, found"
            f" {len(items)} rows of {len(groups)}. Give more data; if these are the validation rows, raise"
            " data.validation or set it to 0."
        )
    ordered = [groups[number] for number in next_indices(len(groups), seed=seed, consumed=0, count=len(groups))]
    order = [index for group in ordered for index in group]
    roll, start = max(map(len, groups)), 0
    matched = list(items)
    for group in ordered:
        for offset, index in enumerate(group):
            # `roll` places back; the remainder keeps a prompt with more than half of the rows off its own rows
            back = (roll - 1 - offset) % (len(order) - len(group))
            other, room = items[order[start - 1 - back]], None
            if max_length is not None:
                room = max_length - len(items[index].prompt_ids)
            matched[index] = replace(items[index], mismatched_ids=other.completion_ids[:room])
        start += len(group)
    return matched


def unpaired_prompts(items: Iterable[TokenCompletion]) -> Iterator[PromptCompletions]:
    """What frozen models are asked about labelled completions: each and its mismatched one, with its `cache_key`."""
    for item in items:
        completions = (item.completion_ids, item.mismatched_ids or [])
        yield PromptCompletions(cache_key(item.row, item.label), item.prompt_ids, completions)


def cache_key(row: int, label: bool | None) -> int:
    """Identifies a labelled completion: a pair makes two from one data row. -1 for padding rows."""
    return 2 * row + bool(label) if row >= 0 else -1


@dataclass(kw_only=True)
class UnpairedBatch(SequenceBatch):
    """B labelled completions.

    Attributes:
        labels: (B,) bool, True for desirable ones.
        mismatched: the same prompts with completions of other ones.
    """

    labels: Tensor
    mismatched: SequenceBatch

    @property
    def keys(self) -> list[int]:
        """The `cache_key` of each row."""
        return [cache_key(row, label) for row, label in zip(self.rows.tolist(), self.labels.tolist(), strict=True)]

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
        mismatched=collate_completions(others),
    )
