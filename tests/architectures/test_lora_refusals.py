"""Models that peft would adapt and that could not be exported as they were trained."""

from __future__ import annotations

import ast

import pytest

from otpo.errors import UserError
from otpo.models.adapters import add_adapters, check_adapters
from otpo.models.loading import load_causal_lm

from .tiny import tiny_config, tiny_model

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}


def named_in(error: UserError) -> list[str]:
    """The modules that a refusal says one can adapt."""
    return ast.literal_eval(str(error).partition("it has ")[2].rstrip("."))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("zamba", "several layers share one weight"),
        ("zamba2", "several layers share one weight"),
        ("llama4_text", "router of .* is no plain linear layer"),
        ("jamba", "dt_proj of .* is no plain linear layer"),
        ("mamba", "peft cannot adapt"),
        ("falcon_h1", "peft cannot adapt"),
        ("nemotron_h", "peft cannot adapt"),
    ],
)
def test_the_modules_that_a_refusal_names_can_be_adapted(tmp_path, name, words):
    tiny_config(name).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words) as refusal:
        check_adapters(tmp_path, LORA)
    check_adapters(tmp_path, LORA | {"target_modules": named_in(refusal.value)})


def test_adapters_of_shared_weights_are_refused_beside_weights_too(tmp_path):
    tiny_model(tiny_config("zamba2")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="several layers share one weight"):
        add_adapters(load_causal_lm(tmp_path, attn_implementation=None), LORA, seed=0)
