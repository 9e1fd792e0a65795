"""A reward model in a folder, exported as a training worker does it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoTokenizer

from otpo.models.disk.reward_tokenizer import pad_token
from otpo.models.export import export
from otpo.models.reward_model import RewardModel, load_reward_lm
from otpo.models.sharding import shard


def export_reward_model(start: Path, folder: Path) -> Path:
    """A reward model with a head that is not zero, sharded and exported.

    Its start pads with EOS, as many do: the export must not.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder / "tokenizer")
    pad = pad_token(tokenizer)
    model = RewardModel(load_reward_lm(start, new_head=True, pad_id=pad))
    torch.nn.init.normal_(model.lm.score.weight, generator=torch.Generator().manual_seed(2))
    model = shard(model, init_device_mesh("cpu", (1,)), dtype=torch.float32)
    out = folder / "model"
    export(model, out, tokenizer=str(folder / "tokenizer"), card="# card", dtype=torch.float32, pad_id=pad)
    dist.destroy_process_group()
    return out
