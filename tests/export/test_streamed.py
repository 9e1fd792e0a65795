"""Exports of several ranks, written a layer at a time, hold the weights and settings that transformers would save."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from support.architectures import PAIRS, make
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from otpo.data.collate import collate_pairs
from otpo.models.adapters import ADAPTER, add_adapters, gather_adapters, merge_adapters
from otpo.models.disk.reloaded import trained_values
from otpo.models.disk.stored import model_places
from otpo.models.disk.writer import write_weights
from otpo.models.export import export
from otpo.models.loading import load_causal_lm
from otpo.models.sharding import shard
from otpo.training.objectives.base import Start, load_policy

LORA = {"r": 3, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
FAMILIES = ("llama-tied", "gemma2-window", "qwen3_moe", "phi3")


def move(model: torch.nn.Module) -> None:
    """The same change of the trained weights, whether they are sharded or not."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.requires_grad:
            change = 0.05 * torch.randn(weight.shape, generator=generator)
            if isinstance(weight, DTensor):
                change = torch.distributed.tensor.distribute_tensor(change, weight.device_mesh, weight.placements)
            weight.data += change


def _rank(rank: int, world: int, folder: str, tokenizer: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    torch.set_num_threads(1)
    mesh, batch = init_device_mesh("cpu", (world,)), collate_pairs(PAIRS)
    for family in FAMILIES:
        for lora in (None, LORA):
            model = load_policy(Start(f"{folder}/{family}", lora=lora, deferred=True))
            dtype = model.lm.dtype
            shard(model.eval(), mesh, dtype=dtype)
            move(model)
            out = Path(folder, f"{family}{' lora' if lora else ''}", "model")
            trained = trained_values(model, batch, dtype)
            export(model, out, tokenizer=tokenizer, card="", dtype=dtype, trained=trained)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_export_what_transformers_would_save(tmp_path, tiny_llama, world):
    """Bfloat16, tied weights, experts that are saved one by one, and adapters; of three rows for four ranks."""
    for family in FAMILIES:
        make(family, "sdpa").to(torch.bfloat16).save_pretrained(tmp_path / family)
    mp.spawn(_rank, (world, str(tmp_path), str(tiny_llama)), nprocs=world)
    for family in FAMILIES:
        start = load_causal_lm(tmp_path / family)
        start.float()
        move(start)
        start.to(torch.bfloat16).save_pretrained(tmp_path / "whole")
        assert_same(tmp_path / family / "model", tmp_path / "whole")
        adapted = add_adapters(load_causal_lm(tmp_path / family), LORA, seed=0)
        move(adapted)
        config = adapted.peft_config[ADAPTER]
        merged = merge_adapters(load_causal_lm(tmp_path / family), config, gather_adapters(adapted))
        merged.save_pretrained(tmp_path / "whole")
        assert_same(tmp_path / f"{family} lora" / "model", tmp_path / "whole")
        adapters = load_file(tmp_path / f"{family} lora" / "adapter" / "adapter_model.safetensors")
        expected = gather_adapters(adapted)
        assert adapters.keys() == expected.keys()
        assert all(torch.equal(adapters[name], expected[name]) for name in expected)


def assert_same(found: Path, expected: Path) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (found, expected))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert ours[name].dtype == weight.dtype and torch.equal(ours[name], weight), name
    for file in ("config.json", "generation_config.json"):
        assert json.loads((found / file).read_text()) == json.loads((expected / file).read_text())
    shutil.rmtree(expected)


@pytest.mark.parametrize("file_bytes", [1, 3000, 40_000, 10**9])
def test_files_hold_no_more_than_they_should_and_load_again(tmp_path, file_bytes):
    lm = make("llama", "sdpa")
    lm.config.save_pretrained(tmp_path)
    state = lm.state_dict()
    write_weights(tmp_path, ({name: weight} for name, weight in state.items()), file_bytes=file_bytes)
    places = model_places(tmp_path)
    assert places.keys() == state.keys()
    files = sorted({place.path for place in places.values()})
    for file in files:
        inside = [place.size for place in places.values() if place.path == file]
        assert sum(inside) <= file_bytes or len(inside) == 1
    whole = sum(place.size for place in places.values())
    assert len(files) == (len(state) if file_bytes == 1 else 1) or whole > file_bytes
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in state.items())
    assert not list(tmp_path.glob(".*"))
