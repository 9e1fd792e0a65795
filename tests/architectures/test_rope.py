"""Rotary frequencies that depend on length: a sequence's log-probabilities are those that it has alone."""

from __future__ import annotations

import random

import pytest
import torch

from otpo.data.collate import collate_pairs
from otpo.models.policy import PolicyModel
from otpo.models.reward_model import RewardModel
from otpo.records import TokenPair
from otpo.training.forward_check import check_forward

from .tiny import tiny_config, tiny_model

ORIGINAL = 24  # tokens up to which the short frequencies hold
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
SCALED = LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.3}
FAMILIES = {
    "llama": {"rope_parameters": LONGROPE},
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL},
    "phimoe": {"rope_parameters": SCALED, "original_max_position_embeddings": ORIGINAL},
    "minicpm3": {"rope_parameters": LONGROPE, "num_key_value_heads": 4},
}


def pairs(*lengths: tuple[int, int, int]) -> list[TokenPair]:
    draw = random.Random(0)

    def ids(n: int) -> list[int]:
        return [draw.randrange(3, 300) for _ in range(n)]

    return [TokenPair(row, ids(p), ids(c), ids(r)) for row, (p, c, r) in enumerate(lengths)]


SHORT = pairs((5, 4, 3), (7, 2, 6))
MIXED = pairs((5, 4, 3), (30, 4, 6), (20, 3, 9), (16, 8, 9))  # both sides, and completions of one prompt across
LONGER = pairs((30, 4, 3), (26, 2, 6))


def model_of(name: str) -> PolicyModel:
    return PolicyModel(tiny_model(tiny_config(name, **FAMILIES[name]))).eval()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_beside_others_as_alone(name):
    model = model_of(name)
    batch = collate_pairs(MIXED)
    own = model.own_logprobs(batch)
    check_forward(model, collate_pairs(SHORT), torch.float32)  # what a start looks at may be short
    for items in (SHORT, MIXED, LONGER, SHORT):
        part = collate_pairs(items)
        torch.testing.assert_close(model(part)[0], model.own_logprobs(part), rtol=1e-4, atol=1e-4)
    model.use_own_head()
    torch.testing.assert_close(model(batch)[0], own, rtol=1e-4, atol=1e-4)


def test_prompts_are_shared_until_a_row_is_long():
    model = model_of("llama")
    with torch.no_grad():
        model(collate_pairs(SHORT))
        assert model.backbone.shares_prompts
        model(collate_pairs(MIXED))
    assert not model.backbone.shares_prompts


def test_gradients_are_those_of_rows_alone():
    """With activation checkpointing, which computes the batch again."""
    batch, grads = collate_pairs(MIXED), []
    for ours in (True, False):
        model = model_of("llama")
        model.lm.gradient_checkpointing_enable({"use_reentrant": False})
        logps = model(batch)[0] if ours else model.own_logprobs(batch)
        (logps * batch.mask).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_scores():
    lm = tiny_model(tiny_config("llama", **FAMILIES["llama"]))
    lm.score = torch.nn.Linear(32, 1, bias=False)
    model = RewardModel(lm)
    alone = [model.scores(collate_pairs([pair])) for pair in MIXED]
    expected = torch.stack(alone, dim=1).flatten()
    torch.testing.assert_close(model.scores(collate_pairs(MIXED)), expected, rtol=1e-4, atol=1e-4)
