"""Runs with adapters: what is refused before anything starts, 4-bit weights, and training through Ray."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import load_file
from support.small_lm import PAIRS
from support.steps import weights
from support.training import metrics, settings, write_pairs
from torch.distributed.device_mesh import init_device_mesh

from otpo.data.collate import collate_pairs
from otpo.errors import UserError
from otpo.methods.spec import resolve
from otpo.models.adapters import (
    adapters_off,
    add_adapters,
    check_quantization,
)
from otpo.models.checkpoint import load_checkpoint, save_checkpoint
from otpo.models.export import export
from otpo.models.loading import load_causal_lm
from otpo.models.policy import PolicyModel
from otpo.models.sharding import shard
from otpo.training.objectives.pair import preference_losses
from otpo.training.step import optimisation_step
from pipeline.recipe import make_recipe
from pipeline.run.run import run

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}


def recipe_of(folder: Path, model: Path, lora: dict | None, methods: dict, *, quantization="none", **train):
    tree = settings(folder, model, methods=methods, train={"max_steps": 4, "global_batch_size": 6} | train)
    tree["model"] |= {"lora": lora, "quantization": quantization}
    return make_recipe(tree)


@pytest.mark.parametrize(
    ("lora", "quantization", "methods", "words"),
    [
        (None, "4bit", {"dpo": {}}, ["quantization is 4bit", "model.lora"]),
        ({}, "4bit", {"dpo": {}}, ["4bit", "CUDA", "train.use_gpu"]),
        ({"rank": 8}, "none", {"dpo": {}}, ["unknown key 'model.lora.rank'"]),
        ({"lora_dropout": 1.0}, "none", {"dpo": {}}, ["model.lora.lora_dropout"]),
        ({"target_modules": []}, "none", {"dpo": {}}, ["target_modules is empty"]),
        ({}, "none", {"reward-model": {}}, ["methods.reward-model", "without model.lora"]),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(tmp_path, tiny_llama, lora, quantization, methods, words):
    with pytest.raises(UserError) as error:
        recipe_of(tmp_path, tiny_llama, lora, methods, quantization=quantization)
    assert all(word in str(error.value) for word in words)


def test_a_run_is_refused_before_anything_starts(tmp_path, tiny_llama):
    recipe = recipe_of(tmp_path, tiny_llama, {"target_modules": ["lm_head"]}, {"dpo": {}})
    with pytest.raises(UserError, match="lm_head"):
        run(recipe, tmp_path / "run", world=None, progress=lambda *_: None, until="train")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_four_bits_without_a_gpu_are_refused_before_anything_starts(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = recipe_of(tmp_path, tiny_llama, {}, {"dpo": {}}, quantization="4bit", use_gpu="auto")
    with pytest.raises(UserError, match=r"CUDA GPU.*found none"):
        run(recipe, tmp_path / "run", world=None, progress=lambda *_: None, until="train")


def test_four_bits_without_bitsandbytes_are_refused():
    pytest.importorskip("peft")
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="bitsandbytes; it is not installed"):
            check_quantization("4bit", gpu=True)
    else:
        check_quantization("4bit", gpu=True)
    check_quantization("none", gpu=False)


@pytest.mark.gpu
def test_four_bit_weights_train_adapters_and_merge(tmp_path, tiny_llama):
    pytest.importorskip("bitsandbytes")
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        mesh = init_device_mesh("cuda", (1,))
        batch = collate_pairs(PAIRS).to(torch.device("cuda", 0))
        lm = add_adapters(load_causal_lm(tiny_llama, four_bit=torch.bfloat16), LORA, seed=0)
        model = shard(PolicyModel(lm), mesh, dtype=torch.bfloat16).eval()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
        frozen = {n: p.detach().clone() for n, p in model.named_parameters() if p.dtype == torch.uint8}
        assert len(frozen) == 2 * 7
        with torch.no_grad():
            reference, _ = model(batch)
        found = preference_losses(model, resolve("dpo", {}), lambda _: {"reference": reference}, seed=0)
        losses = [
            optimisation_step(model, optimizer, [batch], found, denominator=3, max_grad_norm=1.0, lr=1e-2)["loss"]
            for _ in range(5)
        ]
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < losses[0] - 0.01
        assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
        with adapters_off(model), torch.no_grad():
            torch.testing.assert_close(model(batch)[0], reference)
        path = save_checkpoint(tmp_path, model, optimizer, {"step": 5})
        before = weights(model)
        go_on = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
        for p, _ in go_on:
            p.data.zero_()
        load_checkpoint(path, model, optimizer)
        assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
        export(model, tmp_path / "model", tokenizer=str(tiny_llama), card="", dtype=torch.bfloat16)
    finally:
        dist.destroy_process_group()
    merged = load_causal_lm(tmp_path / "model")
    start = load_causal_lm(tiny_llama)
    assert not hasattr(merged.config, "quantization_config") and merged.dtype == start.dtype
    ours, theirs = merged.state_dict(), start.state_dict()
    assert {n for n in ours if not torch.equal(ours[n], theirs[n])} == {n for n in ours if "_proj" in n}


@pytest.mark.slow
def test_adapters_train_through_ray_on_two_workers_as_on_one(tmp_path, tiny_llama):
    """From a recipe: the first loss, the curves of 1 and 2 workers, the folders that are left, checkpoints' size."""
    write_pairs(tmp_path / "pairs.json", n=24)
    methods = {"dpo": {}, "otpo": {}, "tdpo2": {}}
    folders = []
    for workers in (1, 2):
        recipe = recipe_of(
            tmp_path, tiny_llama, {"r": 8, "lora_alpha": 16}, methods, workers=workers, save_every=2,
            warmup_ratio=0.0, learning_rate=0.01, keep_checkpoints=2,
        )  # fmt: skip
        folder = tmp_path / f"runs-{workers}" / "lora"
        run(recipe, folder, world=None, progress=lambda *_: None, until="train")
        folders.append(folder / "models")
    base = load_file(tiny_llama / "model.safetensors")
    for label in methods:
        ours, theirs = (metrics(folder / label)[0] for folder in folders)
        assert ours[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert ours[-1]["loss"] < ours[0]["loss"]
        for key in ("loss", "grad_norm", "rewards/margins"):
            assert [line[key] for line in theirs] == pytest.approx([line[key] for line in ours], rel=1e-4, abs=1e-6)
        merged = load_causal_lm(folders[1] / label / "model")
        adapter = PeftModel.from_pretrained(load_causal_lm(tiny_llama), folders[1] / label / "adapter")
        ids = torch.arange(5, 40)[None]
        with torch.no_grad():
            torch.testing.assert_close(merged(ids).logits, adapter(ids).logits, rtol=1e-5, atol=1e-5)
        saved = load_file(folders[1] / label / "model" / "model.safetensors")
        assert {name for name in base if not torch.equal(saved[name], base[name])} == {
            name for name in base if "_proj" in name
        }
        shards = (folders[1] / label / "checkpoints" / "step-000002").rglob("*.distcp")
        whole = 3 * 4 * sum(weight.numel() for weight in base.values())  # with both moments
        assert sum(file.stat().st_size for file in shards) < whole / 2
        assert '"lora_alpha": 16' in (folders[1] / label / "model" / "README.md").read_text()
