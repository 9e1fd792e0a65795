"""The causal language models that people tune, small, from their own config classes.

The oracle is the plain computation: each sequence alone through transformers' eager attention, whole logits in float32.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from otpo.data.collate import collate_pairs
from otpo.kernels import logprobs as head
from otpo.models import backbone as models
from otpo.models.attention import ARCHITECTURES, why_padded
from otpo.models.policy import PolicyModel
from otpo.records import TokenPair

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW = {"sliding_window": 4, "use_sliding_window": True}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_local_experts": 4}
FAMILIES = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen2-window": {**WINDOW, "max_window_layers": 1},
    "qwen3": {},
    "mistral-window": WINDOW,
    "gemma": {},
    "gemma2-window": {
        **WINDOW,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 4,
    },
    "gemma3_text-window": {
        **WINDOW,
        "query_pre_attn_scalar": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": {},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "granite": {
        "logits_scaling": 8.0,
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 3.0,
    },
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    # not in ARCHITECTURES: padded
    "cohere": {"logit_scale": 0.25},
    "phi": {},
    "gpt_neox": {},
}
PAIRS = [
    TokenPair(0, [5, 6, 7, 8, 9], [8, 9, 10, 11, 12, 13, 14], [13, 14]),
    TokenPair(1, [21], [22], [23, 24, 25, 26, 27, 28, 29]),
    TokenPair(2, [31, 32, 33, 34, 35, 36], [37, 38, 39], [40, 41, 42]),
]
SEQUENCES = [(p.prompt_ids, p.chosen_ids) for p in PAIRS] + [(p.prompt_ids, p.rejected_ids) for p in PAIRS]


def make(family: str, attention: str):
    name = family.split("-")[0]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SHAPE, **FAMILIES[family])
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in lm.parameters():  # norms and biases too, or a forgotten one would not show
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return lm


def by_transformers(lm):
    """Each sequence alone: log-probabilities of its completion, and `hidden_states[-1]` at the predicting positions."""
    values, states = [], []
    for prompt, answer in SEQUENCES:
        out = lm(torch.tensor([prompt + answer]), output_hidden_states=True, use_cache=False)
        places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
        logps = out.logits[0, places].float().log_softmax(-1)
        values.append(logps.gather(-1, torch.tensor(answer)[:, None])[:, 0])
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
    for prompt, answer in SEQUENCES:
        states = theirs(torch.tensor([prompt + answer]), output_hidden_states=True, use_cache=False).hidden_states
        expected.append(states[layer][0, len(prompt) - 1 : -1])
    torch.testing.assert_close(extras["hidden"][batch.mask], torch.cat(expected), rtol=1e-5, atol=2e-5)
    assert not extras["hidden"].requires_grad


def test_every_architecture_that_shares_prompts_is_tested():
    assert {family.split("-")[0] for family in FAMILIES} >= ARCHITECTURES
