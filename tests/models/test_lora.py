"""Adapters: exact beside plain transformers and peft, alone trained, resumed, merged; the start is the reference."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.architectures import make
from support.small_lm import PAIRS, small_lm
from support.steps import go, weights
from torch.distributed.checkpoint import FileSystemReader
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from otpo.data.collate import collate_pairs
from otpo.errors import UserError
from otpo.methods.spec import resolve
from otpo.models.adapters import (
    UnadaptedReference,
    adapters_off,
    add_adapters,
    check_adapters,
    gather_adapters,
)
from otpo.models.checkpoint import load_checkpoint, save_checkpoint
from otpo.models.export import export
from otpo.models.loading import load_causal_lm
from otpo.models.policy import PolicyModel
from otpo.models.sharding import shard
from otpo.training.objectives.pair import preference_losses
from otpo.training.step import optimisation_step

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    small_lm().save_pretrained(folder)
    return folder


def adapted(mesh, start, *, dtype=torch.float32, lora=LORA, **options):
    lm = add_adapters(load_causal_lm(start), lora, seed=0)
    model = shard(PolicyModel(lm), mesh, dtype=dtype, **options).eval()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def moved(mesh, start, **options):
    """A policy whose adapters do something."""
    model, optimizer = adapted(mesh, start, **options)
    go(model, optimizer, 3, lr=0.05)
    return model, optimizer


def logps(model) -> torch.Tensor:
    with torch.no_grad():
        return model(collate_pairs(PAIRS))[0]


def base_logps(start) -> torch.Tensor:
    return logps(PolicyModel(load_causal_lm(start)).eval())


def full(tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@pytest.mark.parametrize("method", ["dpo", "otpo", "tdpo1", "tdpo2"])
def test_training_starts_at_the_reference(mesh, start, method):
    """TDPO reads the reference's whole distribution, from the policy with its adapters off."""
    model, optimizer = adapted(mesh, start)
    reference = base_logps(start)
    found = preference_losses(
        model, resolve(method, {}), lambda _: {"reference": reference}, seed=0, reference=UnadaptedReference(model)
    )
    first, second = (
        optimisation_step(
            model, optimizer, [collate_pairs(PAIRS)], found, denominator=3, max_grad_norm=1.0, lr=1e-2
        )["loss"]
        for _ in range(2)
    )  # fmt: skip
    assert first == pytest.approx(math.log(2), abs=1e-6) and second < first - 1e-3


def test_gradients_are_those_of_plain_transformers_and_peft(mesh, start, tmp_path, tiny_llama):
    """DPO by full logits, one sequence at a time, the reference by peft's own `disable_adapter`."""
    model, _ = moved(mesh, start)
    assert model.backbone.shares_prompts, "the flat layout is what is compared with the plain one"
    reference = base_logps(start)
    found = preference_losses(model, resolve("dpo", {"beta": 0.05}), lambda _: {"reference": reference}, seed=0)
    output = found(collate_pairs(PAIRS))
    output.losses.sum().backward()
    export(model, tmp_path / "model", tokenizer=str(tiny_llama), card="", dtype=torch.float32)
    plain = PeftModel.from_pretrained(load_causal_lm(start), tmp_path / "adapter", is_trainable=True).eval()

    def logp(pair, completion) -> torch.Tensor:
        ids = torch.tensor([pair.prompt_ids + completion])
        each = plain(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        return each[len(pair.prompt_ids) - 1 :].sum()

    losses = []
    for pair in PAIRS:
        margin = logp(pair, pair.chosen_ids) - logp(pair, pair.rejected_ids)
        with torch.no_grad(), plain.disable_adapter():
            start_margin = logp(pair, pair.chosen_ids) - logp(pair, pair.rejected_ids)
        losses.append(-logsigmoid(0.05 * (margin - start_margin)))
    torch.testing.assert_close(output.losses, torch.stack(losses), rtol=1e-5, atol=1e-5)
    torch.stack(losses).sum().backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    ours = {f"base_model.model.{n}": full(p.grad) for n, p in model.lm.named_parameters() if p.grad is not None}
    assert ours.keys() == expected.keys() and len(ours) == 2 * 2 * 7
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_only_adapters_move_and_the_rest_keeps_its_precision(mesh, tmp_path, saved):
    small_lm().to(saved).save_pretrained(tmp_path)
    model, optimizer = adapted(mesh, tmp_path, dtype=torch.bfloat16)
    before = weights(model)
    go(model, optimizer, 3)
    after = weights(model)
    trained = {name for name in before if "lora_" in name}
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained
    assert {after[name].dtype for name in trained} == {torch.float32}
    assert {after[name].dtype for name in after.keys() - trained} == {saved}
    assert len(optimizer.state) == len(trained) == 2 * 2 * 7
    plain = load_causal_lm(tmp_path).state_dict()
    for name in after.keys() - trained:
        assert torch.equal(after[name], plain[name.removeprefix("lm.").replace(".base_layer", "")])


def test_with_adapters_off_the_policy_is_its_start(mesh, start):
    model, _ = moved(mesh, start)
    policy, reference = logps(model), base_logps(start)
    assert (policy - reference).abs().max() > 0.1
    with adapters_off(model):
        torch.testing.assert_close(logps(model), reference, rtol=1e-6, atol=1e-6)
        assert any(p.requires_grad for p in model.parameters())
    assert torch.equal(logps(model), policy)


@pytest.mark.parametrize("method", ["tdpo1", "tdpo2"])
def test_the_live_reference_is_as_good_as_a_second_copy(mesh, start, method):
    """The same losses and gradients; the head that both sides read in the backward pass is one and the same."""
    copy = shard(PolicyModel(load_causal_lm(start)), mesh, dtype=torch.float32, keep_head=True).requires_grad_(False)
    results = []
    for live in (True, False):
        model, _ = moved(mesh, start)
        reference = UnadaptedReference(model) if live else copy.eval()
        ref = base_logps(start)
        found = preference_losses(
            model, resolve(method, {}), lambda _, r=ref: {"reference": r}, seed=0, reference=reference
        )
        losses = found(collate_pairs(PAIRS)).losses
        losses.sum().backward()
        results.append((losses, {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_checkpoint_goes_on_exactly_and_holds_adapters_alone(mesh, tmp_path, tied):
    small_lm(tie_word_embeddings=tied).save_pretrained(tmp_path / "start")
    model, optimizer = adapted(mesh, tmp_path / "start")
    go(model, optimizer, 3)
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 3})
    expected, after = go(model, optimizer, 3), weights(model)
    other, fresh = adapted(mesh, tmp_path / "start")
    assert load_checkpoint(path, other, fresh) == {"step": 3}
    assert go(other, fresh, 3) == expected
    ours = weights(other)
    assert ours.keys() == after.keys() and all(torch.equal(ours[name], after[name]) for name in after)
    kept = [name for name in FileSystemReader(path).read_metadata().state_dict_metadata if name.startswith("model.")]
    assert len(kept) == 2 * 2 * 7 and all("lora_" in name for name in kept)


@pytest.mark.parametrize("tied", [True, False])
def test_the_merged_export_is_the_adapted_policy(mesh, tmp_path, tiny_llama, tied):
    small_lm(tie_word_embeddings=tied).save_pretrained(tmp_path / "start")
    model, _ = moved(mesh, tmp_path / "start")
    out = tmp_path / "dpo" / "model"
    export(model, out, tokenizer=str(tiny_llama), card="# a card", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    torch.testing.assert_close(logps(PolicyModel(merged).eval()), logps(model), rtol=1e-5, atol=1e-5)
    names = load_file(out / "model.safetensors").keys()
    assert names == load_file(tmp_path / "start" / "model.safetensors").keys(), "an ordinary folder"
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"] is tied
    assert (out / "README.md").read_text() == "# a card"
    assert sorted(path.name for path in out.parent.iterdir()) == ["adapter", "model"]
    lm = PeftModel.from_pretrained(load_causal_lm(tmp_path / "start"), out.parent / "adapter").base_model.model
    torch.testing.assert_close(logps(PolicyModel(lm).eval()), logps(model), rtol=1e-5, atol=1e-5)
    written = json.loads((out.parent / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "start")
    assert {name: written[name] for name in ("r", "lora_alpha", "lora_dropout")} == {
        name: LORA[name] for name in ("r", "lora_alpha", "lora_dropout")
    }


@pytest.mark.parametrize("family", ["gemma2-window", "phi3", "mixtral", "qwen3_moe", "gpt_neox"])
def test_other_architectures_are_adapted_sharded_and_merged(mesh, tmp_path, tiny_llama, family):
    """Soft caps and windows, fused projections, experts that are one parameter, biases in the padded layout."""
    make(family, "sdpa").save_pretrained(tmp_path / "start")
    check_adapters(tmp_path / "start", LORA)
    model, optimizer = adapted(mesh, tmp_path / "start")
    reference = base_logps(tmp_path / "start")
    torch.testing.assert_close(logps(model), reference, rtol=0, atol=0)
    found = go(model, optimizer, 3, lr=0.02)
    assert found[-1] < found[0]
    with adapters_off(model):
        torch.testing.assert_close(logps(model), reference, rtol=0, atol=0)
    export(model, tmp_path / "model", tokenizer=str(tiny_llama), card="", dtype=torch.float32)
    torch.testing.assert_close(base_logps(tmp_path / "model"), logps(model), rtol=2e-5, atol=2e-5)
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "model"))
    assert first.keys() == last.keys()
    moved = {name for name in first if not torch.equal(first[name], last[name])}
    assert moved and not [name for name in moved if "norm" in name or "embed" in name or "lm_head" in name]
    if family in ("mixtral", "qwen3_moe"):
        assert any("experts" in name for name in moved)


def test_a_bf16_start_is_merged_in_float32_and_rounded_once(mesh, tmp_path, tiny_llama):
    small_lm().to(torch.bfloat16).save_pretrained(tmp_path / "start")
    model, _ = moved(mesh, tmp_path / "start")
    export(model, tmp_path / "model", tokenizer=str(tiny_llama), card="", dtype=torch.bfloat16)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "model"))
    adapters = gather_adapters(model.lm)
    changed = 0
    for name, weight in before.items():
        a = adapters.get(f"base_model.model.{name.removesuffix('weight')}lora_A.weight")
        expected = weight
        if a is not None:
            b = adapters[f"base_model.model.{name.removesuffix('weight')}lora_B.weight"]
            expected = (weight.float() + 2.0 * (b @ a)).bfloat16()
            changed += 1
        assert torch.equal(after[name], expected)
    assert changed == 14
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"


def test_activation_checkpointing_changes_no_number(mesh, start):
    model, optimizer = adapted(mesh, start)
    other, fresh = adapted(mesh, start, activation_checkpointing=True)
    assert go(other.train(), fresh, 3) == pytest.approx(go(model, optimizer, 3), abs=1e-6)


def test_sharding_changes_no_number(mesh, start):
    model, optimizer = adapted(mesh, start)
    plain = PolicyModel(add_adapters(load_causal_lm(start), LORA, seed=0)).eval()
    fresh = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-3)
    assert go(model, optimizer, 3) == pytest.approx(go(plain, fresh, 3), abs=1e-6)


def test_dropout_acts_in_training_alone(mesh, start):
    model, _ = moved(mesh, start, lora=LORA | {"lora_dropout": 0.5})
    quiet, _ = moved(mesh, start)
    torch.testing.assert_close(logps(model), logps(quiet), rtol=0, atol=0)
    model.train()
    assert (logps(model) - logps(model)).abs().max() > 1e-3


def test_first_matrices_follow_the_seed_alone(start):
    torch.manual_seed(1)
    first = gather_adapters(add_adapters(load_causal_lm(start), LORA, seed=3))
    drawn = torch.rand(3)
    second = gather_adapters(add_adapters(load_causal_lm(start), LORA, seed=3))
    other = gather_adapters(add_adapters(load_causal_lm(start), LORA, seed=4))
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3)), "what the step draws is left alone"
    assert all(torch.equal(first[name], second[name]) for name in first)
    differ = {name for name in first if not torch.equal(first[name], other[name])}
    assert differ == {name for name in first if "lora_A" in name}


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (["lm_head"], ["target_modules", "lm_head", "head", "all-linear"]),
        (["q_proj", "embed_tokens"], ["embed_tokens", "embeddings"]),
        (["c_attn"], ["model.lora", "c_attn"]),
        (["q_proj", "v_porj"], ["has no module v_porj. Name others", "it has ['down_proj', "]),
        (".*nothing", ["model.lora"]),
        (".*", ["peft cannot adapt", "Target module LlamaModel is not supported"]),
    ],
)
def test_modules_that_cannot_be_adapted_are_refused_before_weights_are_read(tmp_path, modules, words):
    small_lm().config.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(UserError) as error:
        check_adapters(tmp_path, LORA | {"target_modules": modules})
    assert all(word in str(error.value) for word in words)


def test_named_modules_and_a_regex_adapt_what_they_say(tmp_path, start):
    for modules in (["q_proj", "v_proj"], r".*\.self_attn\.(q|v)_proj"):
        check_adapters(start, LORA | {"target_modules": modules})
        lm = add_adapters(load_causal_lm(start), LORA | {"target_modules": modules}, seed=0)
        assert {name.split(".")[-4] for name, p in lm.named_parameters() if p.requires_grad} == {"q_proj", "v_proj"}
