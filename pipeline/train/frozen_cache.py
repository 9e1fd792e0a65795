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
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import load_file, save_file
from torch import Tensor

from otpo.data.collate import collate_prompts
from otpo.data.micro_batches import micro_batches
from otpo.models.policy import PolicyModel
from otpo.records import PromptCompletions
from pipeline.recipe import digest

PART_BATCHES = 64  # micro-batches between two writes


class FrozenLogProbs:
    """A frozen model's log-probabilities as a cache holds them.

    Attributes:
        rows: key of a `PromptCompletions` -> for each of its completions, the log-probability of each token.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows: dict[int, tuple[np.ndarray, ...]] = {}
        for part in sorted(folder.glob("part-*.safetensors")):
            arrays = load_file(part)
            count = arrays["lengths"].shape[1]
            bounds = np.concatenate([[0], np.cumsum(arrays["lengths"].reshape(-1))])
            for index, row in enumerate(arrays["rows"]):
                spans = itertools.pairwise(bounds[count * index : count * (index + 1) + 1])
                self.rows[int(row)] = tuple(arrays["logps"][start:end] for start, end in spans)

    def missing(self, items: Iterable[PromptCompletions]) -> list[PromptCompletions]:
        """The items that are not in the cache yet."""
        return [item for item in items if item.key not in self.rows]

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
        return torch.from_numpy(values).to(mask.device)


def cache_folder(root: Path, *, model: str, dtype: str, tokens: str) -> Path:
    """The folder for the log-probabilities of a model (its fingerprint) on a set of token ids (their hash)."""
    return root / digest({"model": model, "dtype": dtype, "tokens": tokens})


@torch.no_grad()
def fill_cache(
    folder: Path,
    model: PolicyModel,
    items: Sequence[PromptCompletions],
    *,
    micro_batch_size: int,
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
        The cache as this rank found it, with the rank's own new rows. Read it again once all ranks are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cache = FrozenLogProbs(folder)
    missing = agree_missing(cache.missing(items), items)
    if not missing:
        return cache
    device = next(model.parameters()).device
    size, budget = 2 * micro_batch_size, 2 * micro_batch_tokens if micro_batch_tokens else None
    done: dict[int, tuple[np.ndarray, ...]] = {}
    groups = micro_batches([item.tokens for item in missing], size=size, budget=budget, rank=rank, world=world)
    for number, indices in enumerate(groups, start=1):
        members = [missing[i] for i in indices] or [replace(missing[0], key=-1)]  # all ranks enter every forward pass
        batch = collate_prompts(members)
        logps, _ = model(batch.to(device))
        values = [row[:length] for row, length in zip(logps.cpu().numpy(), batch.mask.sum(-1).tolist(), strict=True)]
        for index, item in enumerate(members):
            if item.key >= 0:
                done[item.key] = tuple(values[index :: len(members)])
        if number % PART_BATCHES == 0:
            _write_part(folder, done)
            cache.rows |= done
            done = {}
    _write_part(folder, done)
    cache.rows |= done
    return cache


def agree_missing(missing: list[PromptCompletions], items: Sequence[PromptCompletions]) -> list[PromptCompletions]:
    """What rank 0 found missing: another run may be filling the same cache while the ranks look."""
    if not dist.is_initialized():
        return missing
    keys: list[Any] = [{item.key for item in missing}]
    dist.broadcast_object_list(keys)
    return [item for item in items if item.key in keys[0]]


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
