"""`train.torch_compile` changes no number, compiles once for all lengths, and names a missing compiler beforehand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from small_lm import PAIRS, small_lm
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import Gemma2Config, Gemma2ForCausalLM

from otpo.batches import collate_pairs
from otpo.compiled import check_compiler, compile_parts
from otpo.errors import UserError
from otpo.methods import resolve
from otpo.model import PolicyModel, distribute, shard
from otpo.step import adamw, optimisation_step, preference_losses


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()


def losses(model: PolicyModel, batches: list) -> list[float]:
    optimizer = adamw(model, lr=1e-2, weight_decay=0.0)
    found = preference_losses(model, resolve("simpo", {}), lambda batch: {}, seed=0)
    return [
        optimisation_step(model, optimizer, [batch], found, denominator=3, max_grad_norm=1.0, lr=1e-2)["loss"]
        for batch in batches
    ]


@pytest.mark.parametrize("way", [distribute, shard])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed_again"])
def test_it_changes_no_loss_and_is_compiled_once_for_all_lengths(mesh, way, checkpointing):
    batches = [collate_pairs(pairs) for pairs in (PAIRS, PAIRS[:2], PAIRS[1:], PAIRS[::-1])]
    plain, compiled = (
        way(PolicyModel(small_lm()), mesh, dtype=torch.float32, activation_checkpointing=checkpointing).train()
        for _ in range(2)
    )
    names = compile_parts(compiled)
    assert len(names) == 2 * 3 + 1 and sum(name.endswith("mlp") for name in names) == 2
    assert losses(compiled, batches) == pytest.approx(losses(plain, batches), abs=1e-5)
    assert 2 <= counters["stats"]["unique_graphs"] <= 4  # a norm and an MLP; with and without gradients at most


def test_other_architectures_have_such_parts_too(mesh):
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    lm = Gemma2ForCausalLM(config).eval()
    batch = collate_pairs(PAIRS)
    model = PolicyModel(lm)
    expected = model(batch)[0]
    assert len(compile_parts(model)) == 2 * 5 + 1
    torch.testing.assert_close(model(batch)[0], expected, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"]


def test_a_missing_compiler_is_named_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    check_compiler("train.torch_compile")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"train\.torch_compile.*C\+\+ compiler.*CXX"):
        check_compiler("train.torch_compile")
