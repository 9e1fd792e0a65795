"""An exported folder that is not what was trained never gets its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.architectures import make
from support.small_lm import PAIRS, small_lm

from otpo.data.collate import collate_pairs
from otpo.errors import WorkError
from otpo.models.adapters import add_adapters
from otpo.models.disk.reloaded import check_reloaded, trained_values
from otpo.models.export import export
from otpo.models.loading import load_causal_lm
from otpo.models.policy import PolicyModel
from otpo.models.reward_model import RewardModel, load_reward_lm
from otpo.models.sharding import shard

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}


def moved(model):
    """A model whose trained weights are not those that it was loaded with."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def policy(folder: Path, dtype: torch.dtype, **changes) -> PolicyModel:
    small_lm(**changes).to(dtype).save_pretrained(folder)
    return PolicyModel(load_causal_lm(folder)).eval()


def values_of(model, dtype=torch.float32):
    return trained_values(model, collate_pairs(PAIRS), dtype)


def save(model, folder: Path, tokenizer: Path, dtype=torch.float32, **options) -> Path:
    export(model, folder / "model", tokenizer=str(tokenizer), card="", dtype=dtype, **options)
    return folder / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_sound_export_passes(tmp_path, tiny_llama, dtype, adapted, tied):
    model = policy(tmp_path / "start", dtype, tie_word_embeddings=tied)
    if adapted:
        add_adapters(model.lm, LORA, seed=0)
    else:
        model.float()
    folder = save(moved(model), tmp_path, tiny_llama, dtype, trained=values_of(model, dtype))
    assert not list(tmp_path.glob("*.partial")) and (tmp_path / "adapter").exists() is adapted
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}


@pytest.mark.parametrize("kind", ["policy", "reward model"])
@pytest.mark.parametrize("family", ["gemma2-window", "qwen3_moe", "gpt_neox"])
def test_sharded_models_of_other_architectures_pass(mesh, tmp_path, tiny_llama, family, kind):
    """Soft caps that sdpa ignores, experts that are saved one by one, biases, and the classes that FSDP2 makes."""
    make(family, "sdpa").save_pretrained(tmp_path / "start")
    if kind == "policy":
        model, options = PolicyModel(load_causal_lm(tmp_path / "start")), {}
    else:
        model, options = RewardModel(load_reward_lm(tmp_path / "start", new_head=True, pad_id=0)), {"pad_id": 0}
        torch.nn.init.normal_(model.lm.score.weight, generator=torch.Generator().manual_seed(2))
    model = shard(moved(model.eval()), mesh, dtype=torch.float32)
    folder = save(model, tmp_path, tiny_llama, trained=values_of(model), **options)
    names = [load_file(each / "model.safetensors").keys() for each in (tmp_path / "start", folder)]
    assert names[1] - {"score.weight"} <= names[0]


def test_an_export_that_gives_other_log_probabilities_gets_no_name(tmp_path, tiny_llama):
    """The configuration is part of a model: with another base of its rotary positions, the weights say otherwise."""
    model = moved(policy(tmp_path / "start", torch.float32))
    trained = values_of(model)
    model.lm.config.rope_parameters["rope_theta"] = 50.0
    with pytest.raises(WorkError, match=r"a log-probability of a token differs by up to .* as trained\. It is kept"):
        save(model, tmp_path, tiny_llama, trained=trained)
    assert (tmp_path / "model.partial" / "model.safetensors").exists() and not (tmp_path / "model").exists()


def damage(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_weights_that_were_not_written_as_trained_are_named(tmp_path, tiny_llama):
    model = moved(policy(tmp_path / "start", torch.float32, tie_word_embeddings=False))
    folder, weights = save(model, tmp_path, tiny_llama), model.lm.state_dict()
    check_reloaded(folder, PolicyModel, weights.items(), values_of(model))

    def one_bit(found):
        found["lm_head.weight"][3, 4] += 1e-4

    damage(folder, one_bit)
    with pytest.raises(WorkError, match=r"1 weights differ, as lm_head\.weight \(by 0\.0001\)"):
        check_reloaded(folder, PolicyModel, weights.items(), None)
    damage(folder, lambda found: found.pop("lm_head.weight"))
    with pytest.raises(WorkError, match=r"not whole.*missing \['lm_head\.weight'\]"):
        check_reloaded(folder, PolicyModel, weights.items(), None)
    damage(folder, lambda found: found.update({"lm_head.weight": weights["lm_head.weight"], "other": torch.ones(2)}))
    with pytest.raises(WorkError, match=r"not whole.*unexpected \['other'\]"):
        check_reloaded(folder, PolicyModel, weights.items(), None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reward_model_is_read_as_its_users_pad_it(tmp_path, tiny_llama, dtype):
    """Padded with what completions end in, transformers would read the score one token before."""
    small_lm().to(dtype).save_pretrained(tmp_path / "start")
    ends = {ids[-1] for pair in PAIRS for ids in (pair.chosen_ids, pair.rejected_ids)}
    for pad, sound in ((0, True), (min(ends), False)):
        model = RewardModel(load_reward_lm(tmp_path / "start", new_head=True, pad_id=pad)).eval().float()
        torch.nn.init.normal_(model.lm.score.weight, generator=torch.Generator().manual_seed(2))
        options = {"dtype": dtype, "pad_id": pad, "trained": values_of(moved(model), dtype)}
        if sound:
            save(model, tmp_path, tiny_llama, **options)
        else:
            with pytest.raises(WorkError, match=r"plain transformers, a score differs by up to"):
                save(model, tmp_path, tiny_llama, **options)


def test_the_configuration_of_the_folder_says_the_saved_precision(tmp_path, tiny_llama):
    model = policy(tmp_path / "start", torch.bfloat16).float()
    folder = save(moved(model), tmp_path, tiny_llama, torch.bfloat16, trained=values_of(model, torch.float32))
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
