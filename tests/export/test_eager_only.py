"""Architectures whose only attention is eager: adapted, exported, scored and explained without being told so."""

from __future__ import annotations

import pytest
import torch
from architectures.tiny import tiny_config, tiny_model
from conftest import SENTENCES
from support.small_lm import PAIRS
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from otpo.data.collate import collate_pairs
from otpo.explain import model_token_weights
from otpo.methods.spec import resolve
from otpo.models.adapters import add_adapters, gather_adapters
from otpo.models.export import _merged_start, export
from otpo.models.fresh import make_tokenizer
from otpo.models.loading import load_causal_lm
from otpo.models.policy import PolicyModel
from otpo.models.reward_model import RewardScorer

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
BATCH = collate_pairs(PAIRS)


@pytest.fixture(scope="module", params=["gptj", "gpt_oss"])
def start(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(tiny_config(request.param)).save_pretrained(folder)
    make_tokenizer(SENTENCES, 300).save_pretrained(folder)
    return folder


@torch.no_grad()
def logps(lm) -> torch.Tensor:
    return PolicyModel(lm).own_logprobs(BATCH)


def test_adapters_are_exported_merged(start, tmp_path):
    """Gathered from the model itself, and onto the start read anew, as for 4-bit weights."""
    lm = add_adapters(load_causal_lm(start, attn_implementation="eager"), LORA, seed=0)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    model = PolicyModel(lm).eval()
    trained = logps(lm)
    assert (trained - logps(load_causal_lm(start, attn_implementation="eager"))).abs().max() > 0.01
    torch.testing.assert_close(logps(_merged_start(lm, gather_adapters(lm)).lm), trained, rtol=1e-4, atol=1e-4)
    export(model, tmp_path / "model", tokenizer=str(start), card="", dtype=torch.float32)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logps(exported), trained, rtol=1e-4, atol=1e-4)


def test_its_token_weights_are_shown(start):
    rows = model_token_weights(str(start), PAIRS, resolve("otpo", {}))
    assert [len(row["chosen_weights"]) for row in rows] == [len(pair.chosen_ids) for pair in PAIRS]


def test_it_scores(start, tmp_path):
    torch.manual_seed(0)
    config = load_causal_lm(start, attn_implementation="eager").config
    config.num_labels = 1
    lm = AutoModelForSequenceClassification.from_config(config).float().eval()
    lm.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer("Where?" + "Here." + tokenizer.eos_token, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = lm(ids).logits.item()
    assert RewardScorer(tmp_path, template="literal")(["Where?"], ["Here."]) == pytest.approx([expected], abs=1e-4)
