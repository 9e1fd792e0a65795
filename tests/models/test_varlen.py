"""One call of flash attention for all segments, by an emulation of that call: the kernel itself needs a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.architectures import FAMILIES, PAIRS, make
from support.gpu.exact import one_by_one
from support.gpu.varlen import emulated_varlen, through_varlen
from test_architectures import by_transformers
from test_attention import lay_out, tensors

from otpo.data.collate import collate_pairs
from otpo.kernels.varlen import takes_varlen, varlen_attention
from otpo.models.attention import ARCHITECTURES
from otpo.models.policy import PolicyModel
from otpo.records import VarlenPlan

FLAT = [family for family in FAMILIES if family.split("-")[0] in ARCHITECTURES]


@settings(max_examples=30, deadline=None)
@given(
    families=st.lists(st.lists(st.integers(1, 12), min_size=2, max_size=4), min_size=1, max_size=4),
    window=st.none() | st.integers(1, 9),
)
def test_a_call_is_the_loop_over_sequences_with_its_gradients(families, window):
    segments, sequences = lay_out(families)
    inputs, pull = tensors(segments)
    plan = VarlenPlan.of(segments, sequences)
    query, key, value = (x[0] for x in inputs)
    found = varlen_attention(query, key, value, plan, window=window, kernel=emulated_varlen)[None]
    expected = one_by_one(*inputs, segments, sequences, window=window)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, pull), torch.autograd.grad(expected, inputs, pull), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def in_float64(family, attention):
    lm = make(family, attention).double()
    lm.set_experts_implementation("eager")  # the default has no float64
    return lm


@pytest.mark.parametrize("family", FLAT)
def test_every_flat_architecture_gives_its_own_numbers_and_gradients(monkeypatch, family):
    calls = through_varlen(monkeypatch)
    ours, theirs = PolicyModel(in_float64(family, "sdpa")), in_float64(family, "eager")
    assert ours.backbone.shares_prompts
    batch = collate_pairs(PAIRS)
    logps, _ = ours(replace(batch, varlen=VarlenPlan.of(batch.segments, batch.sequences)))
    assert bool(calls) == ("gemma2" not in family), "soft caps take the loop"
    expected, _ = by_transformers(theirs)
    # log-probabilities, and the norms inside transformers, are float32 in any model
    torch.testing.assert_close(logps[batch.mask], expected, rtol=1e-6, atol=1e-5)
    pull = torch.randn(len(expected), generator=torch.Generator().manual_seed(1))
    (logps[batch.mask] * pull).sum().backward()
    (expected * pull).sum().backward()
    for (name, found), wanted in zip(ours.lm.named_parameters(), theirs.parameters(), strict=True):
        if wanted.grad is not None:
            atol = 1e-5 * max(1, wanted.grad.abs().max().item())
            torch.testing.assert_close(found.grad, wanted.grad, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_only_half_precision_without_a_soft_cap_on_a_gpu_takes_it():
    assert not takes_varlen(torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16), None), "a CPU has no such kernel"
