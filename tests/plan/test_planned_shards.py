"""A model that no machine here could hold: sharded over many ranks from its config and its files' headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM

import otpo.models.sharding
from otpo.models.loading import load_causal_lm
from otpo.models.policy import PolicyModel
from otpo.models.sharding import shard
from pipeline.plan import shape_of

SHAPES = Path(__file__).parents[2] / "docs" / "shapes"


def hollow(shape: Path, folder: Path) -> Path:
    """Safetensors files of a model in bfloat16, with headers and, on the disk, nothing behind them."""
    config = AutoConfig.from_pretrained(shape)
    config.save_pretrained(folder)
    with torch.device("meta"):
        weights = list(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).state_dict().items())
    places = {}
    for number, group in enumerate(weights[first : first + 24] for first in range(0, len(weights), 24)):
        header, end = {}, 0
        for name, weight in group:
            start, end = end, end + weight.nbytes
            header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [start, end]}
            places[name] = f"model-{number}.safetensors"
        text = json.dumps(header).encode()
        with (folder / f"model-{number}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("world", [pytest.param(8, marks=pytest.mark.slow), 16])
def test_a_rank_of_a_70b_model_has_the_shards_that_are_planned(tmp_path, monkeypatch, world):
    monkeypatch.setattr(otpo.models.sharding, "read_weights", lambda lm, device: None)  # 141 GB that are not there
    folder = hollow(SHAPES / "llama3-70b", tmp_path)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        lm = load_causal_lm(folder, deferred=True)
        assert all(weight.is_meta for weight in lm.parameters())
        assert not any(buffer.is_meta for buffer in lm.buffers())
        model = shard(PolicyModel(lm), init_device_mesh("cpu", (world,)), dtype=torch.bfloat16)
        shards = [weight.to_local() for weight in model.parameters() if isinstance(weight, DTensor)]
        assert sum(part.numel() for part in shards) == shape_of(folder).parameters // world
        assert all(part.is_meta and part.dtype == torch.float32 for part in shards)
    finally:
        dist.destroy_process_group()
