"""Per-token log-probabilities of frozen models, computed once and shared by every method and trial.

A cache is a folder named by what it was made from (model, precision, token ids). It holds parts, each the rows that
one rank finished between two writes; it is complete when every row is in one of them, so a killed pass goes on where
it stopped and any number of ranks may finish it.
"""

from __future__ import annotations

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

from otpo.data.collate import collate_pairs
from otpo.models.policy import PolicyModel
from otpo.records import SequenceBatch, TokenPair
from otpo.training.step import micro_batches
from pipeline.recipe import digest

PART_BATCHES = 64  # micro-batches between two writes


class FrozenLogProbs:
    """One frozen model's log-probabilities: data row -> (chosen tokens, rejected tokens)."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for part in sorted(folder.glob("part-*.safetensors")):
            arrays = load_file(part)
            bounds = np.concatenate([[0], np.cumsum(arrays["lengths"].reshape(-1))])
            for index, row in enumerate(arrays["rows"]):
                start, middle, end = bounds[2 * index : 2 * index + 3]
                self.rows[int(row)] = (arrays["logps"][start:middle], arrays["logps"][middle:end])

    def missing(self, pairs: Iterable[TokenPair]) -> list[TokenPair]:
        """The pairs that are not in the cache yet."""
        return [pair for pair in pairs if pair.row not in self.rows]

    def batch(self, batch: SequenceBatch) -> Tensor:
        """(2B, T) log-probabilities beside a batch of pairs; 0 where padded and for filler rows."""
        rows = batch.rows[: len(batch.rows) // 2].tolist()
        return torch.cat([self.side(rows, side, batch.mask) for side in (0, 1)])

    def side(self, rows: Sequence[int], side: int, mask: Tensor) -> Tensor:
        """(B, T) log-probabilities of the first (0) or second (1) answers of some rows; 0 where padded and for -1.

        Args:
            mask: (any, T); only its width and device are used.
        """
        values = np.zeros((len(rows), mask.shape[1]), dtype=np.float32)
        for index, row in enumerate(rows):
            if row >= 0:
                logps = self.rows[row][side]
                values[index, : len(logps)] = logps
        return torch.from_numpy(values).to(mask.device)


def cache_folder(root: Path, *, model: str, dtype: str, tokens: str) -> Path:
    """Where the log-probabilities of a model (its fingerprint) on a set of token ids (their hash) are kept."""
    return root / digest({"model": model, "dtype": dtype, "tokens": tokens})


@torch.no_grad()
def fill_cache(
    folder: Path,
    model: PolicyModel,
    pairs: Sequence[TokenPair],
    *,
    micro_batch_size: int,
    micro_batch_tokens: int | None,
    rank: int,
    world: int,
) -> FrozenLogProbs:
    """Compute what is missing from a cache with `model` as it is now. All ranks must call it with the same pairs.

    Returns:
        This rank's view of the cache as it was found, with its own new rows. Read it again once all ranks are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = FrozenLogProbs(folder)
    missing = agree_missing(table.missing(pairs), pairs)
    if not missing:
        return table
    device = next(model.parameters()).device
    size, budget = 2 * micro_batch_size, 2 * micro_batch_tokens if micro_batch_tokens else None  # nothing is kept
    done: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    groups = micro_batches([pair.tokens for pair in missing], size=size, budget=budget, rank=rank, world=world)
    for number, indices in enumerate(groups, start=1):
        members = [missing[i] for i in indices] or [replace(missing[0], row=-1)]
        batch = collate_pairs(members)
        logps, _ = model(batch.to(device))
        values, sizes = logps.cpu().numpy(), batch.mask.sum(-1).tolist()
        for index, pair in enumerate(members):
            if pair.row >= 0:
                other = index + len(members)
                done[pair.row] = (values[index, : sizes[index]], values[other, : sizes[other]])
        if number % PART_BATCHES == 0:
            _write_part(folder, done)
            table.rows |= done
            done = {}
    _write_part(folder, done)
    table.rows |= done
    return table


def agree_missing(missing: list[TokenPair], pairs: Sequence[TokenPair]) -> list[TokenPair]:
    """What rank 0 found missing: another run may be filling the same cache while the ranks look."""
    if not dist.is_initialized():
        return missing
    rows: list[Any] = [{pair.row for pair in missing}]
    dist.broadcast_object_list(rows)
    return [pair for pair in pairs if pair.row in rows[0]]


def _write_part(folder: Path, rows: dict[int, tuple[np.ndarray, np.ndarray]]) -> None:
    if not rows:
        return
    name = f"part-{uuid.uuid4().hex}.safetensors"
    arrays = {
        "rows": np.array(list(rows), dtype=np.int64),
        "lengths": np.array([[len(c), len(r)] for c, r in rows.values()], dtype=np.int64),
        "logps": np.concatenate([values for pair in rows.values() for values in pair]).astype(np.float32),
    }
    save_file(arrays, folder / f".{name}")
    os.replace(folder / f".{name}", folder / name)
