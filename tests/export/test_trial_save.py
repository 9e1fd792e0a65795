"""What would make saving fail is found before training, and what is saved keeps precisions and end tokens."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.command import nothing_begun, otpo, refused
from support.training import settings
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from otpo.errors import UserError
from otpo.models.disk.trial_save import check_saving, check_space
from otpo.models.export import export, other_precisions
from otpo.models.loading import load_causal_lm
from otpo.models.policy import PolicyModel


@pytest.fixture
def start(tmp_path, tiny_llama) -> Path:
    shutil.copytree(tiny_llama, tmp_path / "start")
    return tmp_path / "start"


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_sound_model_passes(start):
    check_saving(start)


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("generation_config.json", {"temperature": 0.6, "do_sample": False}, "`temperature`.*Mend generation_config"),
        ("generation_config.json", {"num_beams": 1, "num_return_sequences": 2}, "num_return_seq.*Mend generation_conf"),
        ("config.json", {"num_attention_heads": 3}, "cannot save the configuration of.*heads.*Mend config.json"),
    ],
)
def test_what_cannot_be_saved_is_refused_with_the_file_to_mend(start, file, values, words):
    change(start / file, **values)
    with pytest.raises(UserError, match=words):
        check_saving(start)


def test_generation_settings_do_not_matter_where_nothing_generates(start):
    change(start / "generation_config.json", temperature=0.6, do_sample=False)
    check_saving(start, generates=False)


def test_without_a_generation_configuration_the_models_own_is_tried(start):
    (start / "generation_config.json").unlink()
    check_saving(start)
    change(start / "config.json", temperature=0.6)
    with pytest.raises(UserError, match=r"cannot save the generation configuration.*`temperature`"):
        check_saving(start)


@pytest.mark.slow
def test_the_command_refuses_before_anything_starts(tmp_path, start):
    """Saving would end a whole training with "Fix these issues to save the configuration"."""
    change(start / "generation_config.json", temperature=0.6, do_sample=False)
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings(tmp_path, start, methods={"dpo": {}})))
    refused(otpo(tmp_path, "train", "recipe.yaml"), "`temperature`", "Mend generation_config.json there: training")
    nothing_begun(tmp_path)


def test_a_disk_that_is_too_small_is_told_before(tmp_path, start):
    (start / "model.safetensors").unlink()
    with (start / "model.safetensors").open("wb") as sparse:
        os.truncate(sparse.fileno(), 2**42)
    out = tmp_path / "runs" / "small" / "models"
    with pytest.raises(UserError, match=r"expected 8796\.1 GB of free space.*\(2 models of 4398\.0 GB\), found"):
        check_space(out, start, models=2, checkpoints=0, adapters=False)
    with pytest.raises(UserError, match=r"each with up to 2 checkpoints of 13194\.1 GB"):
        check_space(out, start, models=1, checkpoints=2, adapters=False)
    with pytest.raises(UserError, match=r"expected 4398\.0 GB"):
        check_space(out, start, models=1, checkpoints=2, adapters=True)
    check_space(out, "owner/name", models=9, checkpoints=9, adapters=False)


def test_several_end_tokens_are_kept(tmp_path, start):
    values = {"eos_token_id": [3, 45, 105], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    change(start / "generation_config.json", **values)
    before = json.loads((start / "generation_config.json").read_text())
    export(PolicyModel(load_causal_lm(start)), tmp_path / "model", tokenizer=str(start), card="", dtype=torch.float32)
    after = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    ignored = {"transformers_version", "_from_model_config"}
    assert {k: v for k, v in after.items() if k not in ignored} == {k: v for k, v in before.items() if k not in ignored}


def test_weights_keep_the_precision_that_they_were_saved_in(tmp_path, start):
    """A router's bias is float32 in a bfloat16 model: rounded, it would send tokens to other experts."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
        first_k_dense_replace=1, max_position_embeddings=64,
    )  # fmt: skip
    lm = DeepseekV3ForCausalLM(config)
    for name, buffer in lm.named_buffers():
        if "e_score" in name:
            buffer.copy_(1 + 1e-4 * torch.arange(4))
    lm.to(torch.bfloat16)
    for name, buffer in lm.named_buffers():
        if "e_score" in name:
            buffer.data = 1 + 1e-4 * torch.arange(4)
    lm.save_pretrained(tmp_path / "moe")
    loaded = load_causal_lm(tmp_path / "moe")
    others, dtype = other_precisions(loaded), loaded.dtype
    model = PolicyModel(loaded).float()  # master weights, as in training
    export(model, tmp_path / "model", tokenizer=str(start), card="", dtype=dtype, others=others)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "model"))
    assert {t.dtype for t in before.values()} == {torch.float32, torch.bfloat16}
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
