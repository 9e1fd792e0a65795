"""The kernels of training on a GPU, in their own precision there, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from support.gpu.exact import error, one_by_one

from otpo.kernels.logprobs import CHUNK_LOGITS, LazyLogits, VocabularyKernels, tile_gradient_, tile_logprobs
from otpo.kernels.varlen import varlen_attention
from otpo.methods.weights.otpo import otpo
from otpo.records import LogProbs, PairLogProbs, VarlenPlan

pytestmark = pytest.mark.gpu

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of a relative norm
SEGMENTS = (37, 120, 5, 300, 64, 1, 1, 255, 129)  # prompt, two completions; three times
SEQUENCES = ((0, 1), (3, 4), (6, 7), (0, 2), (3, 5), (6, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("scale", "softcap", "biased"), [(1.0, None, False), (0.25, None, True), (1.0, 3.0, False)])
def test_log_probabilities_and_their_gradients(monkeypatch, dtype, compiled, scale, softcap, biased):
    monkeypatch.setitem(CHUNK_LOGITS, "cuda", 300 * 1000)  # several chunks, some computed again
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(2000, 64, generator=generator), torch.randn(1000, 64, generator=generator) / 4
    bias = torch.randn(1000, generator=generator) if biased else None
    targets = torch.randint(0, 1000, (2000,), generator=generator)
    pull = torch.rand(2000, generator=generator)
    inputs = [x.to("cuda", dtype).requires_grad_() for x in (states, weight, bias) if x is not None]
    kernels = VocabularyKernels()
    if compiled:
        kernels = VocabularyKernels(
            torch.compile(tile_logprobs, dynamic=True), torch.compile(tile_gradient_, dynamic=True)
        )
    lazy = LazyLogits(*inputs, *[None] * (3 - len(inputs)), scale=scale, softcap=softcap, kernels=kernels)
    logps, squares, _ = lazy.logprobs(targets.cuda(), squares=True)
    gradients = torch.autograd.grad(logps, inputs, pull.cuda())

    rounded = [x.detach().cpu().double().requires_grad_() for x in inputs]
    logits = torch.nn.functional.linear(*rounded) * scale
    expected = (logits if softcap is None else softcap * torch.tanh(logits / softcap)).log_softmax(-1)
    at_target = expected.gather(-1, targets[:, None])[:, 0]
    assert error(logps, at_target) < ROUNDING[dtype]
    assert error(squares, (2 * expected).logsumexp(-1)) < ROUNDING[dtype]
    for found, exact in zip(gradients, torch.autograd.grad(at_target, rounded, pull.double()), strict=True):
        assert error(found, exact) < ROUNDING[dtype]


@pytest.mark.parametrize("window", [None, 50, 3])
@pytest.mark.parametrize(("heads", "groups", "size"), [(8, 2, 64), (4, 4, 128), (4, 1, 256), (6, 2, 96)])
def test_one_call_of_attention_is_each_sequence_alone(heads, groups, size, window):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(SEGMENTS)
    query, key, value, pull = (
        torch.randn(n, tokens, size, generator=generator, dtype=torch.bfloat16) for n in (heads, groups, groups, heads)
    )
    inputs = [x.cuda().requires_grad_() for x in (query, key, value)]
    plan = VarlenPlan.of(SEGMENTS, SEQUENCES).to("cuda")
    found = varlen_attention(*inputs, plan, window=window)
    exact_inputs = [x.double()[None].requires_grad_() for x in (query, key, value)]
    exact = one_by_one(*exact_inputs, SEGMENTS, SEQUENCES, window=window)[0]
    assert error(found, exact) < ROUNDING[torch.bfloat16]
    pull = pull.transpose(0, 1)
    ours = torch.autograd.grad(found, inputs, pull.cuda())
    theirs = torch.autograd.grad(exact, exact_inputs, pull.double())
    for one, other in zip(ours, theirs, strict=True):
        assert error(one, other[0]) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize(("reg", "tolerance"), [(0.03, 1e-4), (0.1, 1e-5), (1.0, 1e-5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalizer", ["official", "none"])
def test_otpo_weights_are_those_of_pot(reg, tolerance, dtype, normalizer):
    """From the same rounded states; without a normalizer the solver takes log-sum-exps in place of products."""
    pytest.importorskip("ot")
    chosen, rejected = states([180, 3, 64], seed=1, dtype=dtype), states([90, 250, 64], seed=2, dtype=dtype)
    settings = {"reg": reg, "reg_m": 0.2, "normalizer": normalizer}
    found = otpo(PairLogProbs(on(chosen, "cuda"), on(rejected, "cuda")), **settings)
    exact = otpo(PairLogProbs(chosen, rejected), **settings, solver="pot", tolerance=1e-12)
    for side in ("chosen", "rejected"):
        torch.testing.assert_close(getattr(found, side).cpu(), getattr(exact, side), rtol=0, atol=tolerance)


def states(lengths: list[int], *, seed: int, dtype: torch.dtype) -> LogProbs:
    """Completions whose neighbouring tokens are alike, as a model's states are."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    hidden = torch.randn(len(lengths), width, 256, generator=generator).cumsum(1) / 40
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return LogProbs(torch.zeros(mask.shape), mask, torch.arange(len(lengths)), hidden=hidden.to(dtype))


def on(side: LogProbs, device: str) -> LogProbs:
    """One side of the pairs on a device."""
    assert side.hidden is not None
    return LogProbs(side.policy.to(device), side.mask.to(device), side.rows.to(device), hidden=side.hidden.to(device))
