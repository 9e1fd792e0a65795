"""Token ids become batches: each prompt is stored once, and the completions that share it follow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from otpo.records import PromptCompletions, SequenceBatch, TokenCompletion, TokenPair, on_device


def collate_pairs(pairs: Sequence[TokenPair]) -> SequenceBatch:
    """Lay out B pairs as S = 2B sequences: first the B chosen, then the B rejected; each prompt is stored once.

    Args:
        pairs: with non-empty prompts and completions.
    """
    return collate_prompts(
        [PromptCompletions(pair.row, pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids)) for pair in pairs]
    )


def collate_prompts(items: Sequence[PromptCompletions]) -> SequenceBatch:
    """Lay out B prompts with k completions each as S = kB sequences: all first completions, then all second ones, ...

    Each prompt is stored once; the keys take the place of data rows.
    """
    count = len(items[0].completions) if items else 0
    return _lay_out(
        [ids for item in items for ids in (item.prompt_ids, *item.completions)],
        [(i * (count + 1), i * (count + 1) + 1 + which) for which in range(count) for i in range(len(items))],
        [item.key for item in items] * count,
    )


def collate_completions(items: Sequence[TokenCompletion]) -> SequenceBatch:
    """Lay out S completions, each with a prompt of its own, as S sequences."""
    return _lay_out(
        [ids for item in items for ids in (item.prompt_ids, item.completion_ids)],
        [(2 * i, 2 * i + 1) for i in range(len(items))],
        [item.row for item in items],
    )


def _lay_out(segments: list[list[int]], sequences: list[tuple[int, int]], rows: list[int]) -> SequenceBatch:
    for (prompt, completion), row in zip(sequences, rows, strict=True):
        if not segments[prompt] or not segments[completion]:
            raise ValueError(f"row {row}: a sequence needs a prompt (to predict the first token from) and a completion")
    sizes = [len(ids) for ids in segments]
    ends = [0, *itertools.accumulate(sizes)]
    places = [0] * len(segments)  # position of a segment's first token in its sequence
    width = max((sizes[completion] for _, completion in sequences), default=0)
    shape = (len(sequences), width)
    positions, targets = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    for index, (prompt, completion) in enumerate(sequences):
        size = sizes[completion]
        places[completion] = sizes[prompt]
        positions[index, 0] = ends[prompt + 1] - 1  # the prompt's last token predicts the completion's first
        positions[index, 1:size] = torch.arange(ends[completion], ends[completion] + size - 1)
        targets[index, :size] = torch.tensor(segments[completion])
        mask[index, :size] = True
    return SequenceBatch(
        input_ids=torch.tensor(list(itertools.chain.from_iterable(segments)), dtype=torch.long),
        position_ids=torch.cat(
            [torch.arange(p, p + n) for p, n in zip(places, sizes, strict=True)] or [torch.empty(0, dtype=torch.long)]
        ),
        segments=tuple(sizes),
        sequences=tuple(sequences),
        positions=positions,
        targets=targets,
        mask=mask,
        rows=torch.tensor(rows, dtype=torch.long),
        row_numbers=tuple(rows),
        flat=mask.flatten().nonzero()[:, 0],
        ends=torch.tensor([ends[completion + 1] - 1 for _, completion in sequences], dtype=torch.long),
    )


def padded(batch: SequenceBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The layout for models that cannot take a flat batch: every sequence whole, padded on the right.

    Returns:
        input_ids (S, L); attention_mask (S, L), 1 on real tokens; positions (S, T), the index into L of the token that
        predicts each completion token, 0 where padded.
    """
    device = batch.input_ids.device
    ends = [0, *itertools.accumulate(batch.segments)]
    # laid out on the host, which knows all lengths, so that it need not wait for the device
    lengths = batch.lengths
    places = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for index, (prompt, completion) in enumerate(batch.sequences):
        start, length = batch.segments[prompt], lengths[index]
        places[index, :start] = torch.arange(ends[prompt], ends[prompt + 1])
        places[index, start:length] = torch.arange(ends[completion], ends[completion + 1])
    attention_mask = (torch.arange(places.shape[1]) < torch.tensor(lengths)[:, None]).long()
    # any id may pad: causal attention never looks to the right
    ids = batch.input_ids[on_device(places, device)]
    return ids, on_device(attention_mask, device), padded_positions(batch)


def padded_positions(batch: SequenceBatch) -> Tensor:
    """(S, T) index of the token that predicts each completion token in its padded sequence; 0 where padded."""
    starts = on_device(torch.tensor([batch.segments[prompt] for prompt, _ in batch.sequences]), batch.mask.device)
    steps = torch.arange(batch.mask.shape[1], device=batch.mask.device)
    return torch.where(batch.mask, starts[:, None] + steps - 1, 0)
