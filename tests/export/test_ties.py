"""What is tied is what shares storage: a head of its own is exported whatever the configuration says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_lm import PAIRS, small_lm
from support.steps import go
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from otpo.data.collate import collate_pairs
from otpo.errors import UserError
from otpo.files import write_json
from otpo.models.adapters import add_adapters
from otpo.models.export import export
from otpo.models.loading import load_causal_lm
from otpo.models.policy import PolicyModel
from otpo.models.sharding import shard
from pipeline.run.folder import LabelFolder
from pipeline.train.job_start import start_notes

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}


def with_own_head(folder: Path, lm: torch.nn.Module) -> Path:
    """A folder whose configuration says tied and whose weights hold a head of their own."""
    lm.config.tie_word_embeddings = False
    lm.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return folder


def neox() -> GPTNeoXForCausalLM:
    """Its head is called `embed_out`."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).eval()


def plain_logps(folder: Path) -> torch.Tensor:
    """Log-probabilities of the pairs' chosen completions by plain transformers, one after the other."""
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    with torch.no_grad():
        for pair in PAIRS:
            ids = torch.tensor([pair.prompt_ids + pair.chosen_ids])
            logps = lm(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
            found.append(logps[-len(pair.chosen_ids) :, 0])
    return torch.cat(found)


def policy_logps(model: PolicyModel) -> torch.Tensor:
    batch = collate_pairs(PAIRS)
    with torch.no_grad():
        logps = model(batch)[0]
    return logps[: len(PAIRS)][batch.mask[: len(PAIRS)]]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("make", [lambda: small_lm(tie_word_embeddings=False), neox], ids=["llama", "gpt_neox"])
def test_a_head_of_its_own_survives_a_configuration_that_says_tied(mesh, tmp_path, tiny_llama, make, adapted):
    """vLLM goes by the configuration alone, so the exported one says what is so."""
    start = with_own_head(tmp_path / "start", make())
    lm = load_causal_lm(start)
    if adapted:
        add_adapters(lm, LORA, seed=0)
    model = shard(PolicyModel(lm), mesh, dtype=torch.float32)
    go(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), 2)
    export(model, tmp_path / "model", tokenizer=str(tiny_llama), card="", dtype=torch.float32)
    torch.testing.assert_close(plain_logps(tmp_path / "model"), policy_logps(model), rtol=1e-5, atol=1e-5)
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == load_file(start / "model.safetensors").keys()
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_that_is_the_embeddings_is_written_once(mesh, tmp_path, tiny_llama):
    """As pytorch_model.bin does, this file holds both names; they are equal, so transformers ties them."""
    lm = small_lm(tie_word_embeddings=True)
    lm.save_pretrained(tmp_path / "start")
    weights = load_file(tmp_path / "start" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "start" / "model.safetensors", {"format": "pt"})
    model = shard(PolicyModel(load_causal_lm(tmp_path / "start")), mesh, dtype=torch.float32)
    go(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 2)
    export(model, tmp_path / "model", tokenizer=str(tiny_llama), card="", dtype=torch.float32)
    torch.testing.assert_close(plain_logps(tmp_path / "model"), policy_logps(model), rtol=1e-5, atol=1e-5)
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["tie_word_embeddings"] is True


# ---- weights that are not there ----


def without(folder: Path, *names: str) -> Path:
    small_lm(tie_word_embeddings=False).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if name not in names}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_weights_that_would_be_drawn_at_random_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"found none for lm_head\.weight.*at random.*`tie_word_embeddings: true`"):
        load_causal_lm(without(tmp_path / "a", "lm_head.weight"))
    with pytest.raises(UserError, match=r"found none for model\.layers\.1\.mlp\.up_proj\.weight: "):
        load_causal_lm(without(tmp_path / "b", "model.layers.1.mlp.up_proj.weight"))


def test_weights_that_no_part_takes_are_named(tmp_path):
    """They are not exported either: those of a vision tower, of layers that predict further tokens."""
    folder = without(tmp_path / "start")
    weights = load_file(folder / "model.safetensors")
    weights |= {f"vision.{i}.weight": torch.ones(2) for i in range(6)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    names = load_causal_lm(folder).weights_not_read
    assert names == tuple(f"vision.{i}.weight" for i in range(6))
    label = LabelFolder(tmp_path / "dpo")
    write_json(label.start_check, {"line": "equal", "fallback": "", "not_read": names})
    (note,) = start_notes([label])
    assert note.startswith("dpo: weights") and note.endswith("vision.3.weight and 2 more.")


def test_weights_of_other_sizes_are_refused(tmp_path):
    folder = without(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 60}))
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight is 64 x 32, not 60 x 32.*`vocab_size`"):
        load_causal_lm(folder)


def test_quantised_weights_are_refused(tmp_path, tiny_llama):
    shutil.copytree(tiny_llama, tmp_path / "awq")
    config = json.loads((tiny_llama / "config.json").read_text())
    for method in ("awq", "gptq", "fp8", "bitsandbytes"):
        quantised = config | {"quantization_config": {"quant_method": method, "bits": 4}}
        (tmp_path / "awq" / "config.json").write_text(json.dumps(quantised))
        with pytest.raises(UserError, match=rf"full precision.*found one quantised by {method}.*model\.quantization"):
            load_causal_lm(tmp_path / "awq")
