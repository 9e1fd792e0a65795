"""The causal language models that people tune, small, from their own config classes.

The oracle is the plain computation: each sequence alone through transformers' eager attention, whole logits in float32.
"""

from __future__ import annotations

import pytest
import torch
from support.architectures import FAMILIES, PAIRS, SEQUENCES, make

from otpo.data.collate import collate_pairs
from otpo.kernels import logprobs as head
from otpo.models import backbone as models
from otpo.models.attention import ARCHITECTURES, why_padded
from otpo.models.policy import PolicyModel


def by_transformers(lm):
    """Each sequence alone: log-probabilities of its completion, and `hidden_states[-1]` at the predicting positions."""
    values, states = [], []
    for prompt, completion in SEQUENCES:
        out = lm(torch.tensor([prompt + completion]), output_hidden_states=True, use_cache=False)
        places = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
        logps = out.logits[0, places].float().log_softmax(-1)
        values.append(logps.gather(-1, torch.tensor(completion)[:, None])[:, 0])
        states.append(out.hidden_states[-1][0, places])
    return torch.cat(values), torch.cat(states)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_gradients_equal_the_plain_computation(monkeypatch, family, attention, padding):
    for module in (models, head):  # as a CPU does it in bfloat16, here to the last digits
        monkeypatch.setattr(module, "bucket_size", lambda count, like: count + padding)
    ours, theirs = PolicyModel(make(family, attention)), make(family, "eager")
    assert ours.backbone.shares_prompts == (attention == "sdpa" and family.split("-")[0] in ARCHITECTURES)
    assert bool(why_padded(family.split("-")[0], attention)) != ours.backbone.shares_prompts
    batch = collate_pairs(PAIRS)
    logps, extras = ours(batch, {"hidden"})
    expected, states = by_transformers(theirs)
    torch.testing.assert_close(logps[batch.mask], expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(extras["hidden"][batch.mask], states, rtol=1e-5, atol=2e-5)
    factors = torch.randn(len(expected), generator=torch.Generator().manual_seed(1))
    (logps[batch.mask] * factors).sum().backward()
    (expected * factors).sum().backward()
    for (name, found), wanted in zip(ours.lm.named_parameters(), theirs.parameters(), strict=True):
        if wanted.grad is None:
            assert found.grad is None or not found.grad.any(), name
        else:
            scale = wanted.grad.abs().max().item()
            torch.testing.assert_close(
                found.grad, wanted.grad, rtol=1e-4, atol=1e-5 * max(1, scale), msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [1, 2, 3, 4, -1, -2, -4])
def test_the_states_of_any_layer_are_transformers_own(layer, attention):
    ours, theirs = PolicyModel(make("gemma2-window", attention)), make("gemma2-window", "eager")
    batch = collate_pairs(PAIRS)
    _, extras = ours(batch, {"hidden"}, layer=layer)
    expected = []
    for prompt, completion in SEQUENCES:
        states = theirs(torch.tensor([prompt + completion]), output_hidden_states=True, use_cache=False).hidden_states
        expected.append(states[layer][0, len(prompt) - 1 : -1])
    torch.testing.assert_close(extras["hidden"][batch.mask], torch.cat(expected), rtol=1e-5, atol=2e-5)
    assert not extras["hidden"].requires_grad


def test_every_architecture_that_shares_prompts_is_tested():
    assert {family.split("-")[0] for family in FAMILIES} >= ARCHITECTURES


def test_a_soft_cap_that_sdpa_would_drop_is_kept_in_every_layout():
    ours, theirs = PolicyModel(make("gemma2-window", "sdpa")), make("gemma2-window", "eager")
    batch = collate_pairs(PAIRS)
    expected, _ = by_transformers(theirs)
    torch.testing.assert_close(ours.own_logprobs(batch)[batch.mask], expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(ours(batch)[0][batch.mask], expected, rtol=1e-5, atol=2e-5)
    ours.backbone.pad()
    torch.testing.assert_close(ours(batch)[0][batch.mask], expected, rtol=1e-5, atol=2e-5)
