"""Token ids become batches: collation, the resumable sampler, the validation split, and the file of token ids."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from otpo.errors import UserError
from otpo.records import SequenceBatch, TokenCompletion, TokenPair

Item = TokenPair | TokenCompletion
T = TypeVar("T", TokenPair, TokenCompletion)


# ---- collation ----


def collate_pairs(pairs: Sequence[TokenPair]) -> SequenceBatch:
    """Lay out B pairs as S = 2B sequences: first the B chosen, then the B rejected; each prompt is stored once.

    Args:
        pairs: with non-empty prompts and answers.
    """
    chosen, rejected = ([(3 * i, 3 * i + side) for i in range(len(pairs))] for side in (1, 2))
    return _lay_out(
        [ids for pair in pairs for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)],
        chosen + rejected,
        [pair.row for pair in pairs] * 2,
    )


def collate_completions(items: Sequence[TokenCompletion]) -> SequenceBatch:
    """Lay out S completions, each with a prompt of its own, as S sequences."""
    return _lay_out(
        [ids for item in items for ids in (item.prompt_ids, item.completion_ids)],
        [(2 * i, 2 * i + 1) for i in range(len(items))],
        [item.row for item in items],
    )


def _lay_out(segments: list[list[int]], sequences: list[tuple[int, int]], rows: list[int]) -> SequenceBatch:
    for (prompt, answer), row in zip(sequences, rows, strict=True):
        if not segments[prompt] or not segments[answer]:
            raise ValueError(f"row {row}: a sequence needs a prompt (to predict the first token from) and an answer")
    sizes = [len(ids) for ids in segments]
    ends = [0, *itertools.accumulate(sizes)]
    places = [0] * len(segments)  # where a segment begins in its sequence
    width = max((sizes[answer] for _, answer in sequences), default=0)
    shape = (len(sequences), width)
    positions, targets = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    for index, (prompt, answer) in enumerate(sequences):
        size = sizes[answer]
        places[answer] = sizes[prompt]
        positions[index, 0] = ends[prompt + 1] - 1  # the prompt's last token predicts the answer's first
        positions[index, 1:size] = torch.arange(ends[answer], ends[answer] + size - 1)
        targets[index, :size] = torch.tensor(segments[answer])
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
    )


def padded(batch: SequenceBatch) -> tuple[Tensor, Tensor, Tensor]:
    """A batch for models that cannot take it flat: every sequence whole, padded on the right.

    Returns:
        input_ids (S, L); attention_mask (S, L), 1 on real tokens; positions (S, T), the index into L of the token that
        predicts each completion token, 0 where padded.
    """
    device = batch.input_ids.device
    pieces = batch.input_ids.split(batch.segments)
    sequences = [torch.cat([pieces[prompt], pieces[answer]]) for prompt, answer in batch.sequences]
    lengths = torch.tensor(batch.lengths, device=device)
    starts = torch.tensor([batch.segments[prompt] for prompt, _ in batch.sequences], device=device)
    # which id pads does not matter: causal attention never looks to the right
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    attention_mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
    steps = torch.arange(batch.mask.shape[1], device=device)
    return ids, attention_mask, torch.where(batch.mask, starts[:, None] + steps - 1, 0)


# ---- order ----


def next_indices(n: int, *, seed: int, consumed: int, count: int) -> list[int]:
    """The next `count` indices into n items after `consumed` ones: the whole state of the sampler is that number.

    Epoch e is a permutation seeded by (seed, e), and epochs follow one another without a gap, so any slicing of the
    stream, on any number of workers and after any restart, gives the same items. The permutation sorts raw Philox
    words, which do not change with the version of numpy.
    """
    if n < 1 or seed < 0 or consumed < 0 or count < 0:
        raise ValueError(f"expected n > 0, the others >= 0; found {n=}, {seed=}, {consumed=}, {count=}")
    first, last = consumed // n, (consumed + count - 1) // n
    epochs = [_permutation(n, seed, epoch) for epoch in range(first, last + 1)]
    if not epochs:
        return []
    return np.concatenate(epochs)[consumed - first * n :][:count].tolist()


def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(words, kind="stable")


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
    for number in _permutation(len(members), seed, 0):
        if len(held) + len(members[number]) <= wanted:
            held.update(members[number])
    if not held or len(held) == len(items):
        raise UserError(
            f"cannot split {len(items)} rows with {len(members)} different prompts into training and {wanted} "
            "validation rows: a prompt's rows stay together, and neither side may be empty"
        )
    train = [item for index, item in enumerate(items) if index not in held]
    return train, [items[index] for index in sorted(held)]


# ---- files ----


def tokens_hash(items: Sequence[Item]) -> str:
    """SHA-256 (hex) over rows, ids and labels, in order: the data's part of a cache key."""
    digest = hashlib.sha256()
    for name, array in _flatten(items).items():
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_tokens(path: str | Path, items: Sequence[Item]) -> None:
    """Write items as safetensors: `ids` int32, `offsets` int64, `rows` int64, of completions also `labels` int8.

    A pair is three consecutive spans of `ids` (prompt, chosen, rejected), a completion two, or three where it has
    `mismatched_ids`. The file appears whole or not at all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(_flatten(items), partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def load_tokens(path: str | Path) -> TokenFile:
    """Open a file of `save_tokens`. The ids stay in the (memory-mapped) file until an item is asked for.

    Raises:
        UserError: no such file, or not one of `save_tokens`.
    """
    return TokenFile(Path(path))


class TokenFile(Sequence[Item]):
    """The items of a token file, made when asked for: equal to the list that was saved."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}
            self.ids, self.offsets, self.rows = arrays["ids"], arrays["offsets"], arrays["rows"]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"expected a file of token ids at {path}, found none that can be read: {error}") from None
        self.labels = arrays.get("labels")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        index = int(index) % len(self)
        row, parts = int(self.rows[index]), (len(self.offsets) - 1) // len(self)
        bounds = self.offsets[index * parts : (index + 1) * parts + 1]
        spans = [self.ids[start:end].tolist() for start, end in itertools.pairwise(bounds)]
        if self.labels is None:
            return TokenPair(row, *spans)
        label = int(self.labels[index])
        return TokenCompletion(row, spans[0], spans[1], None if label < 0 else bool(label), *spans[2:])


def _flatten(items: Sequence[Item]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    spans: list[list[int]] = []
    for item in items:
        if isinstance(item, TokenPair):
            spans += [item.prompt_ids, item.chosen_ids, item.rejected_ids]
        else:
            spans += [item.prompt_ids, item.completion_ids]
            spans += [item.mismatched_ids] if item.mismatched_ids is not None else []
    if items and isinstance(items[0], TokenCompletion):
        labels = [item.label for item in items if isinstance(item, TokenCompletion)]
        arrays["labels"] = np.array([-1 if label is None else int(label) for label in labels], dtype=np.int8)
    arrays["ids"] = np.fromiter(itertools.chain.from_iterable(spans), dtype=np.int32)
    arrays["offsets"] = np.cumsum([0, *map(len, spans)], dtype=np.int64)
    arrays["rows"] = np.array([item.row for item in items], dtype=np.int64)
    return arrays
