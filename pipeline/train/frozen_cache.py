"""Per-token log-probabilities of frozen models, computed once and shared by every method and trial.

A cache is a folder named by what determines its content: model, precision and token ids. Its parts hold the rows that
one rank finished between two writes, so an interrupted pass loses little, and any number of ranks may finish it. The
cache is complete when every key is in one of the parts.

    part-*.safetensors    rows (n,) int64, the keys; lengths (n, k) int64, tokens of each of a key's k completions;
                          logps float32, those of all completions, one after the other
"""

from __future__ import annotations

import itertools
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from otpo.data.collate import collate_prompts
from otpo.data.micro_batches import micro_batches
from otpo.data.token_file import column
from otpo.models.policy import PolicyModel
from otpo.ranks import from_rank_0, rank
from otpo.records import PromptCompletions, on_device
from pipeline.lock.lock import Held, one_writer
from pipeline.recipe import digest

WAIT_SECONDS = 0.5  # between two looks whether another group has filled a cache
PART_BATCHES = 64  # micro-batches between two writes
PASS_ITEMS = 65_536  # items that are sorted by length together, so that batches of similar lengths can be made


class FrozenLogProbs:
    """A frozen model's log-probabilities as a cache holds them.

    Attributes:
        rows: key of a `PromptCompletions` -> for each of its completions, the log-probability of each token.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows = CachedRows([_Part(file) for file in sorted(folder.glob("part-*.safetensors"))])

    def missing(self, items: Sequence[PromptCompletions]) -> np.ndarray:
        """Which of the items are not in the cache yet: their indices, ascending."""
        return np.flatnonzero(~np.isin(column(items, "key"), self.rows.keys_sorted))

    def logprobs(self, keys: Sequence[int], which: int, mask: Tensor) -> Tensor:
        """(B, T) log-probabilities of completion number `which` of B prompts; 0 where padded and for key -1.

        Args:
            keys: of the `PromptCompletions`.
            mask: (any, T); only its width and device are used.
        """
        values = np.zeros((len(keys), mask.shape[1]), dtype=np.float32)
        for index, key in enumerate(keys):
            if key >= 0:
                logps = self.rows[key][which]
                values[index, : len(logps)] = logps
        return on_device(torch.from_numpy(values), mask.device)


class _Part:
    """One file of a cache. The log-probabilities stay in the (memory-mapped) file until they are asked for."""

    def __init__(self, file: Path):
        with safe_open(file, framework="pt") as opened:
            arrays = {name: opened.get_tensor(name).numpy() for name in opened.keys()}
        self.keys, self.logps = arrays["rows"], arrays["logps"]
        self.bounds = np.concatenate([[0], np.cumsum(arrays["lengths"].reshape(-1))])
        self.count = arrays["lengths"].shape[1]

    def row(self, index: int) -> tuple[np.ndarray, ...]:
        """The log-probabilities of each completion of the key number `index`."""
        bounds = self.bounds[self.count * index : self.count * (index + 1) + 1]
        return tuple(self.logps[start:end] for start, end in itertools.pairwise(bounds))


class CachedRows(Mapping[int, tuple[np.ndarray, ...]]):
    """Key -> log-probabilities of its completions, read from the parts when they are asked for.

    Attributes:
        keys_sorted: (n,) int64, all keys.
    """

    def __init__(self, parts: Sequence[_Part]):
        self.parts = parts
        keys = np.concatenate([part.keys for part in parts] or [np.zeros(0, np.int64)])
        self.keys_sorted, first = np.unique(keys, return_index=True)  # two runs may have written the same key
        numbers = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.keys) for part in parts])
        starts = np.cumsum([0, *(len(part.keys) for part in parts)])
        self._part = numbers[first]
        self._index = (first - starts[self._part]).astype(np.int32)

    def __len__(self) -> int:
        return len(self.keys_sorted)

    def __iter__(self) -> Iterator[int]:
        return iter(self.keys_sorted.tolist())

    def __getitem__(self, key: int) -> tuple[np.ndarray, ...]:
        place = int(np.searchsorted(self.keys_sorted, key))
        if place == len(self) or self.keys_sorted[place] != key:
            raise KeyError(key)
        return self.parts[self._part[place]].row(int(self._index[place]))


def cache_folder(root: Path, *, model: str, dtype: str, tokens: str) -> Path:
    """The folder for the log-probabilities of a model (its fingerprint) on a set of token ids (their hash)."""
    return root / digest({"model": model, "dtype": dtype, "tokens": tokens})


@contextmanager
def one_group(folder: Path) -> Iterator[None]:
    """Be the one worker group that fills a cache for the block. Others wait here, and then find it filled.

    All ranks must call it; rank 0 holds the folder. The wait is made of short collectives, which cannot expire.
    """
    with ExitStack() as held:
        while not from_rank_0(rank() == 0 and _hold(folder, held)):
            time.sleep(WAIT_SECONDS)
        yield


def _hold(folder: Path, held: ExitStack) -> bool:
    with suppress(Held):
        held.enter_context(one_writer(folder, otherwise="another place for the runs (--runs DIR)"))
        return True
    return False


@torch.no_grad()
def fill_cache(
    folder: Path,
    model: PolicyModel,
    items: Sequence[PromptCompletions],
    *,
    micro_batch_size: int | None,
    micro_batch_tokens: int | None,
    rank: int,
    world: int,
) -> FrozenLogProbs:
    """Compute what a cache lacks, with `model` as it is now. All ranks must call it with the same items.

    Args:
        items: each with the same number of completions.
        micro_batch_size, micro_batch_tokens: of training. Twice as much is computed at once, as nothing is kept for
            backward.

    Returns:
        The cache with the rank's own new rows. Read it again once all ranks are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cache = FrozenLogProbs(folder)
    # another run may be filling the same cache while the ranks look
    missing = from_rank_0(cache.missing(items))
    if not len(missing):
        return cache
    device = next(model.parameters()).device
    size, budget = (None if limit is None else 2 * limit for limit in (micro_batch_size, micro_batch_tokens))
    tokens = column(items, "tokens")
    for start in range(0, len(missing), PASS_ITEMS):
        chosen = missing[start : start + PASS_ITEMS]
        done: dict[int, tuple[np.ndarray, ...]] = {}
        groups = micro_batches(tokens[chosen].tolist(), size=size, budget=budget, rank=rank, world=world)
        for number, indices in enumerate(groups, start=1):
            members = [items[chosen[i]] for i in indices]
            members = members or [replace(items[chosen[0]], key=-1)]  # all ranks enter every forward pass
            batch = collate_prompts(members)
            logps, _ = model(batch.to(device))
            values = [
                row[:length] for row, length in zip(logps.cpu().numpy(), batch.mask.sum(-1).tolist(), strict=True)
            ]
            for index, item in enumerate(members):
                if item.key >= 0:
                    done[item.key] = tuple(values[index :: len(members)])
            if number % PART_BATCHES == 0:
                _write_part(folder, done)
                done = {}
        _write_part(folder, done)
    return FrozenLogProbs(folder)


def _write_part(folder: Path, rows: dict[int, tuple[np.ndarray, ...]]) -> None:
    if not rows:
        return
    name = f"part-{uuid.uuid4().hex}.safetensors"
    arrays = {
        "rows": np.array(list(rows), dtype=np.int64),
        "lengths": np.array([[len(logps) for logps in row] for row in rows.values()], dtype=np.int64),
        "logps": np.concatenate([logps for row in rows.values() for logps in row]).astype(np.float32),
    }
    save_file(arrays, folder / f".{name}")
    os.replace(folder / f".{name}", folder / name)
