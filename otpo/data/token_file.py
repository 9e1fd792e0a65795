"""The file of token ids that workers read: safetensors, memory-mapped; and the hash that caches are keyed by.

Neither writing nor reading holds the ids of all items in memory, only 8 bytes for each prompt and completion.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import struct
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar, overload

import numpy as np
from safetensors import SafetensorError, safe_open

from otpo.errors import UserError
from otpo.files import replacing
from otpo.records import PromptCompletions, TokenCompletion, TokenPair

Item = TokenPair | TokenCompletion
T = TypeVar("T")

BLOCK = 2**22  # values that are hashed at a time


# ---- writing ----


def save_tokens(path: str | Path, items: Iterable[Item]) -> None:
    """Write items as safetensors: `ids` int32, `offsets` int64, `rows` int64; for completions also `labels` int8.

    A pair is three consecutive spans of `ids` (prompt, chosen, rejected), a completion two, or three where it has
    `mismatched_ids`. The file appears whole or not at all.

    Args:
        items: are asked for one after the other, and not held.
    """
    offsets, rows, labels = array("q", [0]), array("q"), array("b")
    with replacing(path) as partial, tempfile.TemporaryFile(dir=partial.parent) as ids:
        for item in items:
            for span in _spans(item):
                offsets.append(offsets[-1] + len(span))
                ids.write(array("i", span))
            rows.append(item.row)
            if isinstance(item, TokenCompletion):
                labels.append(-1 if item.label is None else int(item.label))
        with partial.open("wb") as file:
            _write_header(file, offsets=offsets, rows=rows, ids=offsets[-1], labels=labels)
            offsets.tofile(file)
            rows.tofile(file)
            ids.seek(0)
            shutil.copyfileobj(ids, file, BLOCK)
            labels.tofile(file)


def _spans(item: Item) -> list[list[int]]:
    if isinstance(item, TokenPair):
        return [item.prompt_ids, item.chosen_ids, item.rejected_ids]
    return [item.prompt_ids, item.completion_ids, *([] if item.mismatched_ids is None else [item.mismatched_ids])]


def _write_header(file: IO[bytes], *, offsets: array[int], rows: array[int], ids: int, labels: array[int]) -> None:
    """The header of https://huggingface.co/docs/safetensors: its own length, then names, types and places as JSON."""
    tensors = [("offsets", "I64", 8, len(offsets)), ("rows", "I64", 8, len(rows)), ("ids", "I32", 4, ids)]
    tensors += [("labels", "I8", 1, len(labels))] if labels else []
    header, end = dict[str, Any](), 0
    for name, dtype, size, count in tensors:
        header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [end, end + size * count]}
        end += size * count
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


# ---- reading ----


def load_tokens(path: str | Path) -> TokenFile:
    """Open a file of `save_tokens`. The ids stay in the (memory-mapped) file until an item is asked for.

    Raises:
        UserError: no such file, or not one of `save_tokens`.
    """
    return TokenFile(Path(path))


class LazyItems(Sequence[T]):
    """A sequence whose items are made when they are asked for."""

    def item(self, index: int) -> T:
        """Number `index`, from 0 to before the length."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.item(number) for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return self.item(int(index) % len(self))


class TokenFile(LazyItems[Item]):
    """The items of a token file, equal to the list that was saved. An item is read when it is asked for.

    Attributes:
        rows: (n,) int64 `row` of each item. labels: (n,) int8 of each completion, -1 for None; None for pairs.
        ids, offsets: as `save_tokens` writes them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}
            self.ids, self.offsets, self.rows = arrays["ids"], arrays["offsets"], arrays["rows"]
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(f"expected a file of token ids at {path}, found none that can be read: {error}") from None
        self.labels = arrays.get("labels")

    @property
    def _parts(self) -> int:
        return (len(self.offsets) - 1) // max(1, len(self))

    @property
    def tokens(self) -> np.ndarray:
        """(n,) int64 `tokens` of each item."""
        return np.diff(self.offsets[:: self._parts])

    def prompts(self) -> np.ndarray:
        """(n,) int64, equal for items with equal prompts (by a 64-bit hash, of this process)."""
        starts, ends = self.offsets[: -1 : self._parts], self.offsets[1 :: self._parts]
        found = (hash(self.ids[start:end].tobytes()) for start, end in zip(starts, ends, strict=True))
        return np.fromiter(found, dtype=np.int64, count=len(self))

    def last_ids(self) -> set[int]:
        """The ids that completions end in."""
        ends = self.offsets[1:].reshape(len(self), -1)[:, 1:]
        return set(np.unique(self.ids[ends.reshape(-1) - 1]).tolist())

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, index: int) -> Item:
        """See `LazyItems`."""
        row, parts = int(self.rows[index]), self._parts
        bounds = self.offsets[index * parts : (index + 1) * parts + 1]
        spans = [self.ids[start:end].tolist() for start, end in itertools.pairwise(bounds)]
        if self.labels is None:
            return TokenPair(row, *spans)
        label = int(self.labels[index])
        return TokenCompletion(row, spans[0], spans[1], None if label < 0 else bool(label), *spans[2:])


class Joined(LazyItems[Item]):
    """The items of several sequences, one after the other."""

    def __init__(self, *parts: Sequence[Item]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.ends = list(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def item(self, index: int) -> Item:
        """See `LazyItems`."""
        part = bisect_right(self.ends, index)
        return self.parts[part][index - (self.ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[Item]:
        return itertools.chain.from_iterable(self.parts)


def column(items: Sequence[Any], name: str) -> np.ndarray:
    """(n,) an attribute of every item, -1 for None; `row`, `label`, `tokens` of items in files without their ids."""
    if isinstance(items, Joined):
        return np.concatenate([column(part, name) for part in items.parts] or [np.zeros(0, np.int64)])
    if isinstance(items, TokenFile):
        stored = {"row": items.rows, "tokens": items.tokens, "label": items.labels}[name]
        if stored is not None:
            return stored
    if isinstance(items, Prompts):
        return items.keys if name == "key" else column(items.items, name)
    return np.array([-1 if (value := getattr(item, name)) is None else value for item in items], dtype=np.int64)


class Prompts(LazyItems[PromptCompletions]):
    """What frozen models are asked about items, made as it is asked for.

    Args:
        make: the prompt and the completions of an item.
        keys: (n,) their keys.
    """

    def __init__(self, items: Sequence[Any], make: Callable[[Any], PromptCompletions], keys: np.ndarray) -> None:
        self.items, self.make, self.keys = items, make, keys

    def __len__(self) -> int:
        return len(self.items)

    def item(self, index: int) -> PromptCompletions:
        """See `LazyItems`."""
        return self.make(self.items[index])


# ---- identity ----


def tokens_hash(*parts: Sequence[Item]) -> str:
    """SHA-256 (hex) over rows, ids and labels, in order: what a cache of these items is keyed by.

    Args:
        parts: hashed as if they were one sequence.
    """
    digest = hashlib.sha256()
    found = [_arrays(part) for part in parts if len(part)] or [_arrays([])]
    for name, first in found[0].items():
        columns, end = [first], int(first[-1]) if name == "offsets" else 0
        for other in found[1:]:
            columns.append(other[name][1:] + end if name == "offsets" else other[name])
            end = int(columns[-1][-1]) if name == "offsets" else 0
        digest.update(f"{name} {first.dtype} ({sum(map(len, columns))},);".encode())
        for values in columns:
            for start in range(0, len(values), BLOCK):
                digest.update(values[start : start + BLOCK].tobytes())
    return digest.hexdigest()


def _arrays(items: Sequence[Item]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    if isinstance(items, TokenFile):
        arrays |= {} if items.labels is None else {"labels": items.labels}
        return arrays | {"ids": items.ids, "offsets": items.offsets, "rows": items.rows}
    spans = [span for item in items for span in _spans(item)]
    if items and isinstance(items[0], TokenCompletion):
        labels = [item.label for item in items if isinstance(item, TokenCompletion)]
        arrays["labels"] = np.array([-1 if label is None else int(label) for label in labels], dtype=np.int8)
    arrays["ids"] = np.fromiter(itertools.chain.from_iterable(spans), dtype=np.int32)
    arrays["offsets"] = np.cumsum([0, *map(len, spans)], dtype=np.int64)
    arrays["rows"] = np.array([item.row for item in items], dtype=np.int64)
    return arrays
