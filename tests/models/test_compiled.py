"""`train.torch_compile` changes no number, compiles for the first batch alone, and needs a compiler, which is named."""

from __future__ import annotations

import pytest
import torch
from support.architectures import FAMILIES, make
from support.architectures import PAIRS as FAMILY_PAIRS
from support.small_lm import PAIRS, small_lm
from torch._dynamo.utils import counters

from otpo.data.collate import collate_pairs
from otpo.errors import UserError
from otpo.kernels.logprobs import LazyLogits, VocabularyKernels, tile_gradient_, tile_logprobs
from otpo.methods.spec import resolve
from otpo.models.adapters import adapters_off, add_adapters
from otpo.models.compiled import check_compiler, compile_layers
from otpo.models.policy import PolicyModel
from otpo.models.sharding import distribute, shard
from otpo.training.objectives.pair import preference_losses
from otpo.training.optimizer import adamw
from otpo.training.step import optimisation_step

KEPT_QUICK = ("llama",)


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()
    counters.clear()


def losses(model: PolicyModel, batches: list) -> tuple[list[float], list[int]]:
    """Of each step the loss, and how many graphs were compiled until then."""
    optimizer = adamw(model, lr=1e-2, weight_decay=0.0)
    of_batch = preference_losses(model, resolve("simpo", {}), lambda batch: {}, seed=0)
    found, graphs = [], []
    for batch in batches:
        taken = optimisation_step(model, optimizer, [batch], of_batch, denominator=3, max_grad_norm=1.0, lr=1e-2)
        found.append(taken["loss"])
        graphs.append(counters["stats"]["unique_graphs"])
    return found, graphs


@pytest.mark.parametrize("way", [distribute, pytest.param(shard, marks=pytest.mark.slow)])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "computed_again"])
def test_it_changes_no_loss_and_no_batch_is_compiled_for(mesh, way, checkpointing):
    batches = [collate_pairs(pairs) for pairs in (PAIRS, PAIRS[:2], PAIRS[1:], PAIRS[::-1])]
    plain, compiled = (
        way(PolicyModel(small_lm()), mesh, dtype=torch.float32, activation_checkpointing=checkpointing).train()
        for _ in range(2)
    )
    compile_layers(compiled)
    PolicyModel(small_lm())  # a reference, made later, is not compiled and leaves what is alone
    expected, nothing = losses(plain, batches)
    found, graphs = losses(compiled, batches)
    assert found == pytest.approx(expected, abs=1e-5)
    assert set(nothing) == {0} and graphs[0] >= 5 and set(graphs) == {graphs[0]}


def logps_and_gradients(model: PolicyModel, pairs: list) -> list[torch.Tensor]:
    model.zero_grad()
    logps, _ = model(collate_pairs(pairs))
    logps.square().sum().backward()
    return [logps.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "family",
    [f if f in KEPT_QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES],
)
def test_every_architecture_gives_what_it_gives_uncompiled(family):
    plain, compiled = PolicyModel(make(family, "sdpa")), PolicyModel(make(family, "sdpa"))
    compile_layers(compiled)
    graphs = 0
    for pairs in (FAMILY_PAIRS, FAMILY_PAIRS[:2], FAMILY_PAIRS[1:]):
        for found, exact in zip(logps_and_gradients(compiled, pairs), logps_and_gradients(plain, pairs), strict=True):
            assert (found - exact).norm() <= 5e-5 * exact.norm() + 1e-6
        graphs = graphs or counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs >= 3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_adapters_are_compiled_on_and_off(mesh, family):
    settings = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}

    def adapted() -> PolicyModel:
        model = PolicyModel(add_adapters(make(family, "sdpa"), settings, seed=0))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        return distribute(model, mesh, dtype=torch.float32)

    plain, compiled = adapted(), adapted()
    compile_layers(compiled)
    on = [logps_and_gradients(model, PAIRS) for model in (compiled, plain)]
    graphs = counters["stats"]["unique_graphs"]
    logps_and_gradients(compiled, PAIRS[1:])
    assert counters["stats"]["unique_graphs"] == graphs
    for found, exact in zip(*on, strict=True):
        assert (found - exact).norm() <= 5e-5 * exact.norm() + 1e-6
    off = []
    for model in (compiled, plain):
        with torch.no_grad(), adapters_off(model):
            off.append(model(collate_pairs(PAIRS))[0])
    torch.testing.assert_close(*off, rtol=1e-5, atol=1e-5)
    assert (off[0] - on[0][0]).abs().max() > 1e-3


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, 4.0)])
def test_figures_of_the_vocabulary_are_those_that_are_not_compiled(scale, softcap):
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, 8, generator=generator) for n in (11, 300))
    targets = torch.randint(0, 300, (11,), generator=generator)
    reference = LazyLogits(states.flip(0), weight, None, scale, softcap)

    def figures(kernels: VocabularyKernels) -> list[torch.Tensor]:
        inputs = [x.clone().requires_grad_() for x in (states, weight)]
        lazy = LazyLogits(inputs[0], inputs[1], None, scale, softcap, kernels)
        logps, squares, kl = lazy.logprobs(targets, squares=True, reference=reference)
        assert squares is not None and kl is not None
        return [logps, squares, kl, *torch.autograd.grad((logps * kl).sum(), inputs)]

    compiled = VocabularyKernels(
        torch.compile(tile_logprobs, dynamic=True), torch.compile(tile_gradient_, dynamic=True)
    )
    for found, exact in zip(figures(compiled), figures(VocabularyKernels()), strict=True):
        torch.testing.assert_close(found, exact, rtol=2e-5, atol=2e-5)
    assert counters["stats"]["unique_graphs"] == 2


def test_a_missing_compiler_is_named_before_anything_starts(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    check_compiler("train.torch_compile")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"train\.torch_compile.*C\+\+ compiler.*CXX"):
        check_compiler("train.torch_compile")
