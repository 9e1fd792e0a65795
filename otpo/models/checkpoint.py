"""Sharded checkpoints to resume from.

    models/<label>/checkpoints/step-000100/   every rank's shards (torch DCP), then `complete.json`, written last

A checkpoint without `complete.json` was interrupted while it was written; nothing reads it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from otpo.files import write_atomically
from otpo.models.policy import PolicyModel
from otpo.models.reward_model import RewardModel

MARK = "complete.json"


def save_checkpoint(
    folder: Path, model: PolicyModel | RewardModel, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write this rank's shards under `folder/step-N`; rank 0 marks the checkpoint complete when all are written.

    Only trained weights are saved: a run that resumes has loaded the others already.

    Args:
        state: JSON values that `load_checkpoint` returns; must hold "step".
    """
    path = folder / f"step-{state['step']:06d}"
    if _rank() == 0:
        shutil.rmtree(path, ignore_errors=True)  # an unfinished one of an earlier attempt
        path.mkdir(parents=True)
    _barrier()
    dcp.save(_state(model, optimizer), checkpoint_id=path)
    _barrier()
    if _rank() == 0:
        write_atomically(path / MARK, json.dumps(state, indent=1))
    _barrier()
    return path


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if _is_complete(path)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _is_complete(path: Path) -> bool:
    try:
        return "step" in read_state(path)
    except (OSError, ValueError):
        return False


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a complete checkpoint."""
    return json.loads((path / MARK).read_text())


def load_checkpoint(path: Path, model: PolicyModel | RewardModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load shards into the model and the optimizer, whatever the number of ranks that wrote them.

    Returns:
        The state that `save_checkpoint` was given.
    """
    tree = _state(model, optimizer)
    dcp.load(tree, checkpoint_id=path)  # into the weights themselves
    set_optimizer_state_dict(model, optimizer, tree["optimizer"])
    return read_state(path)


def _state(model: PolicyModel | RewardModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    # not the modules' state dict: 4-bit weights add entries to it that cannot be sharded
    weights = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"model": weights, "optimizer": get_optimizer_state_dict(model, optimizer)}


def prune_checkpoints(folder: Path, keep: int, best: int | None) -> None:
    """Delete all complete checkpoints but the newest `keep` and that of step `best`. Rank 0 only."""
    for path in complete_checkpoints(folder)[:-keep]:
        if best is None or path.name != f"step-{best:06d}":
            (path / MARK).unlink()  # the mark first: an interrupted deletion must not leave a complete checkpoint
            shutil.rmtree(path)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
