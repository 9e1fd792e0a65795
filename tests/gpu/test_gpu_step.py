"""Training steps on one GPU: as on the CPU, in every way of computing that a GPU has."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.architectures import FAMILIES, PAIRS, make
from support.random_pairs import spec_of
from support.small_lm import small_lm
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from otpo.data.collate import collate_pairs
from otpo.methods import FROZEN_MODELS
from otpo.models.attention import ARCHITECTURES
from otpo.models.checkpoint import load_checkpoint, save_checkpoint
from otpo.models.compiled import compile_layers
from otpo.models.policy import PolicyModel
from otpo.models.sharding import distribute, shard
from otpo.records import TokenPair
from otpo.training.forward_check import check_forward, check_repeats
from otpo.training.objectives.pair import preference_losses
from otpo.training.optimizer import adamw
from otpo.training.step import Totals, optimisation_step

pytestmark = pytest.mark.gpu

METHODS = ("dpo", "otpo", "simpo", "orpo", "sampo", "tdpo2", "sepo", "ipo")
HEAD_64 = {
    "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "max_position_embeddings": 512,
    "initializer_range": 0.15,
}  # fmt: skip
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """One process with one GPU; what it computes on the CPU for comparison needs a backend there."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    torch.cuda.set_device(0)
    yield init_device_mesh("cuda", (1,))
    dist.destroy_process_group()


def pairs(count: int, longest: int = 60) -> list[TokenPair]:
    """Random pairs for `small_lm`."""
    draw = random.Random(0)

    def words() -> list[int]:
        return [draw.randrange(3, 64) for _ in range(draw.randint(1, longest))]

    return [TokenPair(row, words(), words(), words()) for row in range(count)]


def small() -> Any:
    """A Llama with heads of 64 for flash attention, and weights that are not tiny."""
    return small_lm(**HEAD_64)


def train(
    mesh: DeviceMesh | None, method: str, dtype: torch.dtype, *, way: Any = distribute, steps: int = 4, **options: Any
) -> list[dict[str, float]]:
    """The figures of some steps of two micro-batches; without a mesh in float32 on the CPU, as the model is."""
    compiled = options.pop("compiled", False)
    model, device = PolicyModel(small()), "cpu" if mesh is None else "cuda"
    if mesh is not None:
        model = way(model, mesh, dtype=dtype, **options)
    if compiled:
        compile_layers(model)
    reference = PolicyModel(small())
    if mesh is not None:
        reference = way(reference, mesh, dtype=dtype, keep_head=True)
    optimizer = adamw(model, lr=3e-4, weight_decay=0.0)
    items = pairs(8)
    batches = [collate_pairs(items[:3]).to(device), collate_pairs(items[3:]).to(device)]
    with torch.no_grad():
        known = {id(batch): model(batch)[0] for batch in batches}
    losses = preference_losses(
        model,
        spec_of(method),
        lambda batch: dict.fromkeys(("reference", *FROZEN_MODELS), known[id(batch)]),
        seed=0,
        reference=reference.requires_grad_(False),
    )
    return [
        optimisation_step(model, optimizer, batches, losses, denominator=len(items), max_grad_norm=1.0, lr=3e-4)
        for _ in range(steps)
    ]


def compare(found: list[dict[str, float]], expected: list[dict[str, float]], *, loss: float, norm: float) -> None:
    """Losses may lie this far apart, gradient norms this part of the largest."""
    assert [f["loss"] for f in found] == pytest.approx([e["loss"] for e in expected], abs=loss)
    norms = [e["grad_norm"] for e in expected]
    assert [f["grad_norm"] for f in found] == pytest.approx(norms, abs=norm * max(norms))


@pytest.mark.parametrize("method", METHODS)
def test_float32_steps_are_those_of_a_cpu(mesh, method):
    compare(train(mesh, method, FP32), train(None, method, FP32), loss=1e-4, norm=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_steps_follow_them(mesh, method):
    found, expected = train(mesh, method, BF16), train(None, method, FP32)
    compare(found, expected, loss=0.03 * max(1.0, abs(expected[0]["loss"])), norm=0.05)
    if method in ("dpo", "otpo", "sampo"):
        assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("method", ["dpo", "otpo", "tdpo2"])
def test_a_group_of_one_is_one_gpu(mesh, method, dtype):
    loss, norm = (1e-5, 1e-4) if dtype == FP32 else (2e-2, 3e-2)
    compare(train(mesh, method, dtype, way=shard), train(mesh, method, dtype), loss=loss, norm=norm)


@pytest.mark.parametrize("way", [distribute, shard])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed again"])
def test_compiled_layers_compute_the_same(mesh, way, checkpointing):
    options = {"way": way, "activation_checkpointing": checkpointing}
    compare(train(mesh, "otpo", BF16, compiled=True, **options), train(mesh, "otpo", BF16), loss=2e-2, norm=3e-2)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.split("-")[0] in ARCHITECTURES])
def test_flat_batches_give_the_models_own_numbers(mesh, family):
    model = distribute(PolicyModel(make(family, "sdpa")), mesh, dtype=BF16)
    batch = collate_pairs(PAIRS).to("cuda")
    found = check_forward(model, batch, BF16)
    assert (found.layout, found.head, found.fallbacks) == ("flat", "fused", ()), found
    check_repeats(model, batch, BF16, found.values)


@pytest.mark.parametrize("method", ["dpo", "otpo", "sepo", "simpo"])
@pytest.mark.parametrize("way", [distribute, shard])
def test_the_host_does_not_wait_in_a_micro_batch(mesh, method, way):
    model = way(PolicyModel(small()), mesh, dtype=BF16)
    batch = collate_pairs(pairs(5)).to("cuda")
    with torch.no_grad():
        known, _ = model(batch)
    losses = preference_losses(
        model, spec_of(method), lambda _: dict.fromkeys(("reference", *FROZEN_MODELS), known), seed=0
    )

    def micro_batch() -> None:
        Totals().add(losses(batch), batch).backward()

    micro_batch()  # what is compiled or made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        micro_batch()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("way", [distribute, shard])
def test_a_checkpoint_goes_on_where_it_was_saved(mesh, tmp_path, way):
    batch = collate_pairs(pairs(6)).to("cuda")

    def made() -> tuple[Any, Any, Any]:
        model = way(PolicyModel(small()), mesh, dtype=BF16)
        optimizer = adamw(model, lr=3e-4, weight_decay=0.0)
        losses = preference_losses(model, spec_of("simpo"), lambda _: {}, seed=0)

        def step() -> float:
            options: dict[str, Any] = {"denominator": 6, "max_grad_norm": 1.0, "lr": 1e-3}
            return optimisation_step(model, optimizer, [batch], losses, **options)["loss"]

        return model, optimizer, step

    model, optimizer, step = made()
    first = [step() for _ in range(3)]
    path = save_checkpoint(tmp_path, model, optimizer, {"step": 3})
    later = [step() for _ in range(3)]
    model, optimizer, step = made()
    assert load_checkpoint(path, model, optimizer)["step"] == 3
    # atomic additions of the embedding's gradient come in any order
    assert [step() for _ in range(3)] == pytest.approx(later, abs=2e-3)
    assert later[0] < first[0]
