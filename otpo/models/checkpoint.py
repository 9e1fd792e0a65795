"""Sharded checkpoints to resume from, and export as a Hugging Face folder.

    models/<label>/checkpoints/step-000100/   every rank's shards (torch DCP), then `complete.json`, written last
    models/<label>/model/                     config, safetensors, tokenizer, model card; adapters merged
    models/<label>/adapter/                   the adapters alone, if the model has any, in peft's format

A checkpoint without its completion mark does not exist for anybody.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import AutoTokenizer, PreTrainedModel

from otpo.files import write_atomically
from otpo.models.adapters import ADAPTER, gather_adapters, has_adapters, merge_adapters
from otpo.models.policy import PolicyModel, load_causal_lm

MARK = "complete.json"


def save_checkpoint(folder: Path, model: PolicyModel, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """Write this rank's shards under `folder/step-N`; rank 0 marks the checkpoint complete when all are written.

    Weights that are not trained are left out: whoever resumes has loaded them already.

    Args:
        state: JSON values to come back from `load_checkpoint`; must hold "step".
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
    """Finished checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if _is_complete(path)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _is_complete(path: Path) -> bool:
    try:
        return "step" in read_state(path)
    except (OSError, ValueError):
        return False


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a finished checkpoint."""
    return json.loads((path / MARK).read_text())


def load_checkpoint(path: Path, model: PolicyModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load shards into the model and the optimizer, whatever the number of ranks that wrote them."""
    tree = _state(model, optimizer)
    dcp.load(tree, checkpoint_id=path)  # into the weights themselves
    set_optimizer_state_dict(model, optimizer, tree["optimizer"])
    return read_state(path)


def _state(model: PolicyModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    # not the modules' own state: those of 4-bit weights add entries that no shard can hold
    weights = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"model": weights, "optimizer": get_optimizer_state_dict(model, optimizer)}


def prune_checkpoints(folder: Path, keep: int, best: int | None) -> None:
    """Delete all but the newest `keep` finished checkpoints and the best one. Rank 0 only."""
    for path in complete_checkpoints(folder)[:-keep]:
        if best is None or path.name != f"step-{best:06d}":
            (path / MARK).unlink()  # first the mark, so that an interrupted deletion leaves nothing that looks whole
            shutil.rmtree(path)


def export(
    model: PolicyModel, out: Path, *, tokenizer: str, card: str, dtype: torch.dtype, pad_id: int | None = None
) -> None:
    """Gather the weights and write a folder that transformers and vLLM load. All ranks must call it.

    The folder appears under its name only when it is whole. Adapters are added to the weights that they were trained
    beside, as those were saved (also where training read them in 4 bits), and are written to `adapter` beside `out`.

    Args:
        dtype: what to save in; adapted weights keep the precision of their start.
        pad_id: of the folder's tokenizer, where that is not the tokenizer's own.
    """
    adapted = has_adapters(model.lm)
    state: dict[str, Any] = (
        gather_adapters(model.lm)
        if adapted
        else get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    )
    if _rank() == 0:
        partial = out.with_name(out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        if adapted:
            _save_merged(model.lm, state, partial, out.with_name("adapter"))
        else:
            _save_whole(model.lm, state, partial, dtype)
        words = AutoTokenizer.from_pretrained(tokenizer)
        if pad_id is not None:
            words.pad_token = words.convert_ids_to_tokens(pad_id)
        words.save_pretrained(partial)
        (partial / "README.md").write_text(card)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(partial, out)
    _barrier()


def _save_whole(lm: PreTrainedModel, state: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
    weights = {name.removeprefix("lm."): tensor.to(dtype) for name, tensor in state.items()}
    if lm.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    lm.save_pretrained(folder, state_dict=weights)
    lm.config.dtype = dtype  # transformers writes that of the master weights
    lm.config.save_pretrained(folder)


def _save_merged(lm: PreTrainedModel, adapters: dict[str, Any], folder: Path, adapter: Path) -> None:
    partial = adapter.with_name(adapter.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    start = load_causal_lm(str(lm.name_or_path))
    merge_adapters(start, lm.peft_config[ADAPTER], adapters, partial).save_pretrained(folder)
    shutil.rmtree(adapter, ignore_errors=True)
    os.replace(partial, adapter)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
