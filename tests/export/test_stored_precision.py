"""Files whose weights are not what config.json says: other precisions, more layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_lm import small_lm

from otpo.errors import UserError
from otpo.models.disk.architecture import check_language_model, check_reward_start
from otpo.models.disk.loaded import rounded_at_loading
from otpo.models.loading import load_causal_lm
from otpo.models.reward_model import load_reward_lm


def saved(folder: Path, change=lambda name, weight: weight, **config) -> Path:
    """A model whose weights are changed in the file, and settings in config.json."""
    small_lm().save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = {name: change(name, weight) for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | config))
    return folder


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_that_do_not_say_so(tmp_path, dtype):
    """transformers reads a weight of int8 as whole numbers."""
    start = saved(tmp_path, lambda name, w: (100 * w).to(dtype) if "up_proj" in name else w)
    for check in (check_language_model, check_reward_start, load_causal_lm):
        with pytest.raises(UserError, match=r"found 2 others: .*up_proj.weight \(.*Start from the model"):
            check(start)


def test_masks_and_counts_are_no_weights(tmp_path):
    start = saved(tmp_path)
    weights = load_file(start / "model.safetensors")
    mask = {"model.layers.0.self_attn.bias": torch.ones(4, 4, dtype=torch.uint8)}
    save_file(weights | mask, start / "model.safetensors", metadata={"format": "pt"})
    check_language_model(start)
    assert load_causal_lm(start).weights_not_read == tuple(mask)


def test_files_with_more_layers_than_the_configuration(tmp_path):
    start = saved(tmp_path, num_hidden_layers=1)
    for load in (load_causal_lm, lambda path: load_reward_lm(path, new_head=True)):
        with pytest.raises(UserError, match=r"says that the model has 1 layers, and its files hold layer 2"):
            load(start)


def test_a_lower_precision_in_the_configuration_is_told(tmp_path):
    assert rounded_at_loading(saved(tmp_path / "same")) == ""
    start = saved(tmp_path / "lower", dtype="float16")
    assert load_causal_lm(start).dtype == torch.float16
    assert "weights in float32, and its config.json says float16" in rounded_at_loading(start)
