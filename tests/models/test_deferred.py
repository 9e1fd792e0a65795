"""Weights that are read after sharding are those that transformers loads, on two and four ranks and on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from architectures.tiny import names, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from support.architectures import PAIRS, make
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from otpo.data.collate import collate_pairs
from otpo.errors import UserError
from otpo.models.loading import load_causal_lm
from otpo.models.policy import PolicyModel
from otpo.models.sharding import shard
from otpo.training.objectives.base import Start, load_policy
from otpo.training.objectives.reward import RewardObjective

LORA = {"r": 3, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
SENT = "transformers converts them while it loads them"


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Weights and buffers by every name that they have."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def assert_same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Weights, buffers, precisions, what is trained and what is tied."""
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].requires_grad == tensor.requires_grad, name
        assert torch.equal(whole(ours[name]), whole(tensor)), name
    for copy, source in (found.lm.all_tied_weights_keys | expected.lm.all_tied_weights_keys).items():
        copy, source = f"lm.{copy}", f"lm.{source}"
        assert (ours[copy] is ours[source]) == (theirs[copy] is theirs[source]), copy


def save(kind: str, folder: Path) -> Path:
    """A model folder of one of KINDS."""
    family, _, how = kind.partition(" ")
    lm = make(family, "sdpa")
    if how == "bf16":
        lm = lm.to(torch.bfloat16)
    lm.save_pretrained(folder, max_shard_size="20KB" if how == "many files" else "1GB")
    weights = folder / "model.safetensors"
    if how == "bin":
        torch.save(lm.state_dict(), folder / "pytorch_model.bin")
        weights.unlink()
    if how in ("own head", "same head"):
        held = load_file(weights)
        held["lm_head.weight"] = held["model.embed_tokens.weight"] + (0.5 if how == "own head" else 0)
        save_file(held, weights, {"format": "pt"})
    return folder


KINDS = {
    "llama": "",
    "llama many files": "",
    "llama bf16": "",
    "llama-tied": "",
    "llama-tied own head": "",
    "llama-tied same head": "",
    "llama-tied bin": "they are not in safetensors files",
    "gemma2-window bf16": "",
    "gemma3_text-window": "",
    "phi3": "",
    "qwen3_moe": SENT,
    "gpt_neox": SENT,
}


def _rank(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    torch.set_num_threads(1)
    mesh, batch, said = init_device_mesh("cpu", (world,)), collate_pairs(PAIRS), {}
    for kind in KINDS:
        for lora in (None, LORA):
            models: list[Any] = []
            for deferred in (False, True):
                model = load_policy(Start(f"{folder}/{kind}", lora=lora, seed=3, deferred=deferred))
                models.append(shard(model, mesh, dtype=model.lm.dtype))
                said[kind] = getattr(model.lm, "weights_sent", None)
            assert_same(models[1], models[0])
            with torch.no_grad():
                values = [model(batch)[0] for model in models]
            assert torch.equal(values[0], values[1]), kind
            assert_same(models[1], models[0])
    for pad in (None, 0, 70):
        objective = RewardObjective(None)  # type: ignore[arg-type]  # it loads without its spec
        found, expected = (
            shard(objective.load(Start(f"{folder}/llama", pad_id=pad, deferred=deferred)), mesh, dtype=torch.float32)
            for deferred in (True, False)
        )
        if pad == 70:  # the rows that are added are drawn: rank 0's for all
            added = [whole(tensors(model)["lm.model.embed_tokens.weight"]) for model in (found, expected)]
            assert added[0].shape == added[1].shape and torch.equal(added[0][:64], added[1][:64])
        else:
            assert_same(found, expected)
    Path(f"{folder}/said{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_each_rank_reads_its_part_of_the_weights_that_transformers_loads(tmp_path, world):
    """Whatever the files are; with adapters, with a scalar head, with a head that is tied and with one that is not."""
    for kind in KINDS:
        save(kind, tmp_path / kind)
    mp.spawn(_rank, (world, str(tmp_path)), nprocs=world)
    for rank in range(world):
        assert json.loads((tmp_path / f"said{rank}.json").read_text()) == KINDS


def check_architecture(name: str, mesh, folder: Path) -> str:
    """What was compared for an architecture: "equal", "sent", or why nothing could be."""
    try:
        tiny_model(tiny_config(name)).save_pretrained(folder)
        expected = load_causal_lm(folder, attn_implementation="eager")
    except Exception as error:  # not built without another package, not saved by its class, or refused
        return type(error).__name__
    found = load_causal_lm(folder, attn_implementation="eager", deferred=True)
    sent = found.weights_sent if hasattr(found, "weights_sent") else "at once"
    assert_same(*(shard(PolicyModel(lm), mesh, dtype=torch.float32) for lm in (found, expected)))
    return sent or "equal"


QUICK = {
    "llama": "equal",
    "bert": "equal",  # its class marks the embeddings as a layer, which a tied head shares
    "falcon_h1": "equal",  # a module computes buffers of those inside it
    "mamba": "equal",  # marks a layer and a part of it
    "zamba": "equal",  # layers that share weights
    "opt": "equal",
    "gpt2": "equal",
    "deepseek_v3": SENT,
    "qwen2_vl": "at once",
}


@pytest.mark.parametrize("name", QUICK)
def test_buffers_and_ties_are_those_of_an_architecture(mesh, tmp_path, name):
    assert check_architecture(name, mesh, tmp_path) == QUICK[name]


@pytest.mark.slow
def test_buffers_and_ties_are_those_of_every_architecture(mesh, tmp_path):
    found = [check_architecture(name, mesh, tmp_path / name) for name in names()]
    assert found.count("equal") > 100 and found.count(SENT) > 40


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda held: held.pop("model.norm.weight"), "found none for model.norm.weight"),
        (lambda held: held.update({"model.norm.weight": torch.ones(31)}), "model.norm.weight is 31, not 32"),
    ],
)
def test_files_that_are_not_the_models_are_refused_before_it_is_sharded(tmp_path, change, words):
    folder = save("llama", tmp_path)
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=words):
        load_causal_lm(folder, deferred=True)


def test_a_torn_file_is_refused(tmp_path):
    folder = save("llama", tmp_path)
    torn = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(torn[: len(torn) // 2])
    with pytest.raises(UserError, match="No causal language model could be loaded"):
        load_causal_lm(folder, deferred=True)
