"""The file of token ids that workers read: safetensors, memory-mapped; and the hash that caches are keyed by."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from otpo.errors import UserError
from otpo.files import replacing
from otpo.records import TokenCompletion, TokenPair

Item = TokenPair | TokenCompletion


def tokens_hash(items: Sequence[Item]) -> str:
    """SHA-256 (hex) over rows, ids and labels, in order: what a cache of these items is keyed by."""
    digest = hashlib.sha256()
    for name, array in _flatten(items).items():
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_tokens(path: str | Path, items: Sequence[Item]) -> None:
    """Write items as safetensors: `ids` int32, `offsets` int64, `rows` int64; for completions also `labels` int8.

    A pair is three consecutive spans of `ids` (prompt, chosen, rejected), a completion two, or three where it has
    `mismatched_ids`. The file appears whole or not at all.
    """
    with replacing(path) as partial:
        save_file(_flatten(items), partial)


def load_tokens(path: str | Path) -> TokenFile:
    """Open a file of `save_tokens`. The ids stay in the (memory-mapped) file until an item is asked for.

    Raises:
        UserError: no such file, or not one of `save_tokens`.
    """
    return TokenFile(Path(path))


class TokenFile(Sequence[Item]):
    """The items of a token file, equal to the list that was saved. An item is read when it is asked for."""

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
