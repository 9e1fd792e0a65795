"""Mixed precision on one worker does what FSDP's does, and between passes the model holds its float32 weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.small_lm import PAIRS, small_lm
from torch.distributed.tensor import DTensor

from otpo.data.collate import collate_pairs
from otpo.methods.spec import resolve
from otpo.models.checkpoint import load_checkpoint, save_checkpoint
from otpo.models.policy import PolicyModel
from otpo.models.sharding import distribute, shard
from otpo.training.objectives.pair import preference_losses
from otpo.training.optimizer import adamw
from otpo.training.step import optimisation_step


def start(way, mesh, *, tied=True, dtype=torch.bfloat16, **options):
    model = way(PolicyModel(small_lm(tie_word_embeddings=tied)), mesh, dtype=dtype, **options)
    return model, adamw(model, lr=1e-3, weight_decay=0.0)


def go(model, optimizer, steps=3, batches=1):
    found = preference_losses(model, resolve("simpo", {}), lambda batch: {}, seed=0)
    size = len(PAIRS) // batches
    parts = [collate_pairs(PAIRS[i * size : (i + 1) * size]) for i in range(batches)]
    return [
        optimisation_step(model, optimizer, parts, found, denominator=3, max_grad_norm=1.0, lr=1e-2)["loss"]
        for _ in range(steps)
    ]


def weights(model) -> dict[str, torch.Tensor]:
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.named_parameters()}


def assert_equal(first, second) -> None:
    torch.testing.assert_close(weights(first), weights(second), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("batches", [1, 3])
def test_it_trains_as_fsdp_does(mesh, dtype, batches):
    """Also over several micro-batches, whose gradients both add up in float32. FSDP adds up those of an embedding's
    rows in the low precision: a token that comes twice is the last bit's difference.
    """
    one, other = (start(way, mesh, tied=False, dtype=dtype) for way in (distribute, shard))
    assert go(*one, batches=batches) == pytest.approx(go(*other, batches=batches), rel=1e-3)
    tolerance = 1.5e-3 if dtype == torch.bfloat16 else 0  # Adam moves a weight by 0.03 here, however small its gradient
    torch.testing.assert_close(weights(one[0]), weights(other[0]), rtol=0, atol=tolerance)


def test_a_tied_weights_gradients_add_up_in_float32(mesh):
    """Its gradient is that of an embedding and of a head that are two weights with the same values."""
    gradients = []
    for tied in (True, False):
        lm = small_lm(tie_word_embeddings=tied)
        if not tied:
            lm.load_state_dict(small_lm(tie_word_embeddings=True).state_dict())
        model = distribute(PolicyModel(lm), mesh, dtype=torch.bfloat16)
        model(collate_pairs(PAIRS))[0].sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    tied, untied = gradients
    head, embedding = untied.pop("lm.lm_head.weight"), untied.pop("lm.model.embed_tokens.weight")
    assert head is not None and embedding is not None and embedding.dtype == torch.float32
    torch.testing.assert_close(tied.pop("lm.model.embed_tokens.weight"), head + embedding, rtol=0, atol=1e-4)
    assert head.abs().max() > 1, "else bfloat16 would pass too"
    torch.testing.assert_close(tied, untied, rtol=0, atol=0)


def test_it_computes_in_the_low_precision(mesh):
    low, _ = start(distribute, mesh)
    exact, _ = start(distribute, mesh, dtype=torch.float32)
    batch = collate_pairs(PAIRS)
    found, expected = low(batch)[0], exact(batch)[0]
    assert 1e-5 < (found - expected).abs().max() < 0.1
    seen = []
    low.lm.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    low(batch)
    assert seen == [torch.bfloat16]


def test_between_passes_the_weights_are_float32_and_every_one_is_trained(mesh):
    model, _ = start(distribute, mesh)
    with torch.no_grad():
        model(collate_pairs(PAIRS))
        model.lazy_logits(collate_pairs(PAIRS))
    optimizer, before = adamw(model, lr=1e-3, weight_decay=0.0), weights(model)
    assert {weight.dtype for weight in before.values()} == {torch.float32}
    go(model, optimizer, 1)
    assert not [name for name, weight in weights(model).items() if torch.equal(weight, before[name])]


def test_a_pass_that_fails_leaves_the_weights_in_place(mesh):
    model, _ = start(distribute, mesh)
    broken = collate_pairs(PAIRS)
    broken.input_ids[0] = 10**6
    with pytest.raises(IndexError):
        model(broken)
    with pytest.raises(IndexError):
        model.lazy_logits(broken)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_weight_that_changes_changes_the_next_pass(mesh):
    model, _ = start(distribute, mesh)
    batch = collate_pairs(PAIRS)
    with torch.no_grad():
        before = model(batch)[0]
        for weight in model.parameters():
            weight.mul_(1.5)
        assert not torch.equal(model(batch)[0], before)


def test_activation_checkpointing_computes_again_in_the_same_precision(mesh):
    model, optimizer = start(distribute, mesh, activation_checkpointing=True)
    plain = start(distribute, mesh)
    assert go(model.train(), optimizer) == go(*plain)
    assert_equal(model, plain[0])


@pytest.mark.parametrize(("first", "second"), [(distribute, shard), (shard, distribute)], ids=["one-to-fsdp", "back"])
def test_a_checkpoint_goes_from_one_way_to_the_other(mesh, tmp_path: Path, first, second):
    """So a run that several workers began can be finished by one."""
    model, optimizer = start(first, mesh, dtype=torch.float32)
    go(model, optimizer)
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 3})
    resumed, fresh = start(second, mesh, dtype=torch.float32)
    load_checkpoint(path, resumed, fresh)
    assert go(resumed, fresh) == go(model, optimizer)
    assert_equal(resumed, model)


def test_what_a_checkpoint_brings_is_computed_with(mesh, tmp_path: Path):
    model, optimizer = start(distribute, mesh)
    go(model, optimizer)
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 3})
    resumed, fresh = start(distribute, mesh)
    batch = collate_pairs(PAIRS)
    with torch.no_grad():
        before = resumed(batch)[0]
        load_checkpoint(path, resumed, fresh)
        assert torch.equal(resumed(batch)[0], model(batch)[0])
        assert not torch.equal(before, model(batch)[0])
