"""Sharded models in a group of one: checkpoints that count only when complete, resuming, export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.small_lm import PAIRS, small_lm
from support.steps import go, weights
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from otpo.data.collate import collate_pairs
from otpo.files import write_atomically
from otpo.models.checkpoint import (
    MARK,
    complete_checkpoints,
    load_checkpoint,
    newest_whole_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
)
from otpo.models.export import export
from otpo.models.policy import PolicyModel
from otpo.models.sharding import shard


def sharded(mesh, dtype=torch.float32, **changes):
    model = shard(PolicyModel(small_lm(**changes)), mesh, dtype=dtype)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def equal(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_checkpoint_goes_on_exactly(mesh, tmp_path, tied):
    """Weights and the optimizer's moments both come back: the next steps are the same to the last bit."""
    model, optimizer = sharded(mesh, tie_word_embeddings=tied)
    go(model, optimizer, 3)
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 3, "best": {"value": 0.1}})
    expected, after = go(model, optimizer, 3), weights(model)
    other, fresh = sharded(mesh, tie_word_embeddings=tied)
    assert load_checkpoint(path, other, fresh) == {"step": 3, "best": {"value": 0.1}}
    assert go(other, fresh, 3) == expected and equal(weights(other), after)


def test_sharding_changes_no_number(mesh):
    model, optimizer = sharded(mesh)
    plain = PolicyModel(small_lm())
    losses = go(plain, torch.optim.AdamW(plain.parameters(), lr=1e-3), 3)
    assert go(model, optimizer, 3) == pytest.approx(losses, abs=1e-6)


def test_every_weight_is_trained_after_a_pass_without_gradient(mesh):
    """Frozen models and evaluations run without a backward pass; optimizers and checkpoints come after them."""
    model, _ = sharded(mesh)
    batch = collate_pairs(PAIRS)
    with torch.no_grad():
        model(batch)
    assert all(isinstance(p, DTensor) for p in model.parameters()), "sharded again"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = weights(model)
    go(model, optimizer)
    assert not [name for name, weight in weights(model).items() if torch.equal(weight, before[name])]


def test_a_checkpoint_can_be_saved_after_an_evaluation(mesh, tmp_path):
    model, optimizer = sharded(mesh)
    go(model, optimizer)
    before = weights(model)
    with torch.no_grad():
        model(collate_pairs(PAIRS))
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 1})
    go(model, optimizer)
    with torch.no_grad():
        model(collate_pairs(PAIRS))
    load_checkpoint(path, model, optimizer)
    assert equal(weights(model), before)


def test_bf16_computes_in_bf16_and_keeps_master_weights_in_float32(mesh):
    model, optimizer = sharded(mesh, dtype=torch.bfloat16)
    before = weights(model)
    assert {w.dtype for w in before.values()} == {torch.float32}
    go(model, optimizer, lr=5e-7)
    moved = [(weights(model)[name] - before[name]).abs().max().item() for name in before]
    assert 0 < max(moved) < 2e-6, "steps that bf16 weights would not feel"
    state = next(iter(optimizer.state.values()))
    assert state["exp_avg"].dtype == torch.float32


def test_only_a_marked_checkpoint_is_one(mesh, tmp_path):
    model, optimizer = sharded(mesh)
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, model, optimizer, {"step": step})
    names = lambda: [path.name for path in complete_checkpoints(tmp_path)]  # noqa: E731
    assert names() == ["step-000002", "step-000004", "step-000006"]
    (tmp_path / "step-000006" / MARK).unlink()
    assert names() == ["step-000002", "step-000004"]
    (tmp_path / "step-000004" / MARK).write_text('{"step": ')
    assert names() == ["step-000002"], "half a mark is none"
    (tmp_path / "step-000002" / MARK).write_text("[]")
    assert names() == []
    save_checkpoint(tmp_path, model, optimizer, {"step": 6})
    assert names() == ["step-000006"], "an unfinished one is written anew"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-100]), "bytes instead of"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-1] + b"?"), "has changed"),
        (lambda shard: shard.unlink(), "No such file"),
        (lambda shard: shard.with_name(".metadata").write_bytes(b""), ".metadata has 0 bytes"),
    ],
    ids=["cut", "changed", "lost", "table cut"],
)
def test_a_torn_checkpoint_is_set_aside_and_the_one_before_is_used(mesh, tmp_path, damage, words):
    model, optimizer = sharded(mesh)
    for step in (2, 4):
        save_checkpoint(tmp_path, model, optimizer, {"step": step})
    assert newest_whole_checkpoint(tmp_path) == (tmp_path / "step-000004", [])
    damage(next((tmp_path / "step-000004").glob("__0_*")))
    found, remarks = newest_whole_checkpoint(tmp_path)
    assert found == tmp_path / "step-000002"
    assert len(remarks) == 1 and words in remarks[0] and "torn-step-000004" in remarks[0]
    assert load_checkpoint(found, model, optimizer) == {"step": 2}
    assert (tmp_path / "torn-step-000004").is_dir() and complete_checkpoints(tmp_path) == [found]
    damage(next(found.glob("__0_*")))
    assert newest_whole_checkpoint(tmp_path)[0] is None


def test_a_checkpoint_of_an_earlier_version_has_no_record_and_is_used(mesh, tmp_path):
    model, optimizer = sharded(mesh)
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 2})
    (path / MARK).write_text(json.dumps({"step": 2}))
    assert newest_whole_checkpoint(tmp_path) == (path, [])


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (999_999, 1_000_000, 20):
        folder = tmp_path / f"step-{step:06d}"
        folder.mkdir()
        (folder / MARK).write_text(json.dumps({"step": step}))
    assert [read_state(path)["step"] for path in complete_checkpoints(tmp_path)] == [20, 999_999, 1_000_000]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(1, None, [5]), (2, None, [4, 5]), (1, 2, [2, 5]), (2, 5, [4, 5]), (9, None, [1, 2, 3, 4, 5])],
)
def test_pruning_keeps_the_newest_and_the_best(tmp_path, keep, best, left):
    for step in range(1, 6):
        folder = tmp_path / f"step-{step:06d}"
        folder.mkdir()
        (folder / MARK).write_text(json.dumps({"step": step}))
    (tmp_path / "step-000006").mkdir()
    prune_checkpoints(tmp_path, keep, best)
    assert [read_state(path)["step"] for path in complete_checkpoints(tmp_path)] == left
    assert len(list(tmp_path.iterdir())) == len(left) + 1, "an unfinished one may be being written: it is left alone"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_export_gives_the_trained_models_logits(mesh, tmp_path, tiny_llama, tied, dtype):
    model, optimizer = sharded(mesh, tie_word_embeddings=tied)
    go(model, optimizer, 3)
    batch = collate_pairs(PAIRS)
    with torch.no_grad():
        trained, _ = model(batch)
    out = tmp_path / "model"
    export(model, out, tokenizer=str(tiny_llama), card="# a card", dtype=dtype)
    lm = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert lm.dtype == dtype and lm.config.tie_word_embeddings is tied
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.") and config["architectures"] == ["LlamaForCausalLM"]
    with torch.no_grad():
        loaded, _ = PolicyModel(lm.eval())(batch)
    tolerance = 1e-6 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(loaded, trained, rtol=tolerance, atol=tolerance)
    assert (out / "README.md").read_text() == "# a card"
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(tiny_llama).chat_template
    assert not (tmp_path / "model.partial").exists()


def test_an_export_takes_the_place_of_an_older_one(mesh, tmp_path, tiny_llama):
    out = tmp_path / "model"
    out.mkdir()
    (out / "old").touch()
    export(sharded(mesh)[0], out, tokenizer=str(tiny_llama), card="", dtype=torch.float32)
    assert not (out / "old").exists() and (out / "model.safetensors").exists()


def test_architectures_that_name_their_layers_otherwise_are_sharded_too(mesh):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    plain = PolicyModel(GPT2LMHeadModel(config).eval())
    batch = collate_pairs(PAIRS)
    with torch.no_grad():
        expected, _ = plain(batch)
    model = shard(plain, mesh, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(batch)[0], expected, rtol=1e-5, atol=1e-5)


def test_activation_checkpointing_changes_no_number(mesh):
    model, optimizer = sharded(mesh)
    other = shard(PolicyModel(small_lm()), mesh, dtype=torch.float32, activation_checkpointing=True).train()
    assert go(other, torch.optim.AdamW(other.parameters(), lr=1e-3), 3) == pytest.approx(
        go(model, optimizer, 3), abs=1e-6
    )


def test_a_file_is_replaced_whole(tmp_path: Path):
    write_atomically(tmp_path / "a", "one")
    write_atomically(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "two" and len(list(tmp_path.iterdir())) == 1
