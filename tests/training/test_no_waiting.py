"""A micro-batch on a GPU's way of computing: the host waits for nothing, and launches do not grow with the pairs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.gpu.path import Launches, take_gpu_path
from support.random_pairs import PAIR_METHODS, spec_of
from support.small_lm import small_lm
from transformers import AutoConfig, AutoModelForCausalLM

from otpo.data.collate import collate_pairs
from otpo.kernels.mixed_precision import compute_in
from otpo.methods import FROZEN_MODELS
from otpo.models.policy import PolicyModel
from otpo.models.sharding import checkpoint_layers, decoder_layers
from otpo.records import TokenPair, VarlenPlan
from otpo.training.objectives.pair import cached_pairs, preference_losses
from otpo.training.step import Totals
from pipeline.train.frozen_cache import FrozenLogProbs


def pairs_of(count):
    generator = np.random.default_rng(0)
    return [
        TokenPair(row, *(generator.integers(3, 60, size).tolist() for size in generator.integers(2, 12, 3)))
        for row in range(count)
    ]


def micro_batch(monkeypatch, method, count, *, lm=None, checkpointing=False):
    """Launches of the forward and backward pass of a micro-batch of pairs, computed in bfloat16 on one GPU."""
    model = PolicyModel(small_lm() if lm is None else lm)
    if checkpointing:
        checkpoint_layers(model)
    compute_in(torch.bfloat16, model, decoder_layers(model), model.forward_methods)
    pairs = pairs_of(count)
    batch = collate_pairs(pairs)
    batch = replace(batch, varlen=VarlenPlan.of(batch.segments, batch.sequences))
    cache = FrozenLogProbs.__new__(FrozenLogProbs)
    cache.rows = {p.row: tuple(np.zeros(len(ids), np.float32) for ids in (p.chosen_ids, p.rejected_ids)) for p in pairs}
    cached = dict.fromkeys(("reference", *FROZEN_MODELS), cache)
    reference = PolicyModel(small_lm())
    losses = preference_losses(
        model, spec_of(method), lambda batch: cached_pairs(cached, batch), seed=0, reference=reference
    )
    launches = Launches()
    with monkeypatch.context() as patch:
        take_gpu_path(patch, launches)
        for counted in (False, True):  # the first pass makes what later ones keep
            launches.off = not counted
            totals = Totals()
            with launches:
                totals.add(losses(batch), batch).backward()
    return launches


COUPLED = {"aot", "aot-unpaired"}  # they read the values of the whole global batch, once a step


@pytest.mark.parametrize("method", [method for method in PAIR_METHODS if method not in COUPLED])
def test_the_host_does_not_wait_in_a_micro_batch(monkeypatch, method):
    assert micro_batch(monkeypatch, method, 3).waits == {}


def test_launches_do_not_grow_with_the_pairs(monkeypatch):
    few, many = (micro_batch(monkeypatch, "otpo", count).operations.total() for count in (2, 17))
    assert abs(many - few) <= 3, "sides of equal width are not cut"


def of_depth(kind, layers):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=kind == "qwen2",
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


@pytest.mark.parametrize(
    ("kind", "layers", "checkpointing", "most"),
    [("qwen2", 24, False, 10_618 // 3), ("llama", 16, False, 7_298 // 3), ("llama", 32, True, 19_186 // 3)],
    ids=["0.5B", "1B", "8B"],
)
def test_launches_of_a_micro_batch_are_few(monkeypatch, kind, layers, checkpointing, most):
    """OTPO on 17 pairs, at most a third of what a loop over sequences and an uncompiled solver launch."""
    of_two, of_four = (
        micro_batch(monkeypatch, "otpo", 17, lm=of_depth(kind, n), checkpointing=checkpointing).operations.total()
        for n in (2, 4)
    )
    a_layer = (of_four - of_two) / 2
    total = of_two + (layers - 2) * a_layer
    print(f"{kind}, {layers} layers: {total:.0f} operations, {a_layer:.0f} a layer")
    assert total <= most
