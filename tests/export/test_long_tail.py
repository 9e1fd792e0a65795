"""Models as people have them: pickled weights, padded vocabularies, a head that the configuration denies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.small_lm import small_lm

from otpo.errors import UserError
from otpo.identity import model_fingerprint
from otpo.models.export import export
from otpo.models.loading import load_causal_lm
from otpo.models.policy import PolicyModel
from pipeline.generate.model_folder import open_model, why_not_vllm


def pickled(folder: Path, lm, shards: int) -> Path:
    """A folder of pytorch_model.bin, whole or in shards with their index, as older tools save one."""
    lm.config.save_pretrained(folder)
    weights = lm.state_dict()
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    names = sorted(weights)
    index = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = {name: weights[name].clone() for name in names[number::shards]}
        torch.save(part, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    )
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_are_exported_as_safetensors(tmp_path, tiny_llama, shards, tied):
    lm = small_lm(tie_word_embeddings=tied)
    start = pickled(tmp_path / "start", lm, shards)
    model = PolicyModel(load_causal_lm(start))
    export(model, tmp_path / "model", tokenizer=str(tiny_llama), card="", dtype=torch.float32)
    found = load_file(tmp_path / "model" / "model.safetensors")
    expected = lm.state_dict()
    assert found.keys() == expected.keys() - ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert not list((tmp_path / "model").glob("*.bin"))


def test_one_changed_shard_is_another_model(tmp_path):
    start = pickled(tmp_path, small_lm(), 3)
    before = model_fingerprint(start)
    file = start / "pytorch_model-00002-of-00003.bin"
    torch.save({name: 2 * tensor for name, tensor in torch.load(file, weights_only=True).items()}, file)
    assert model_fingerprint(start) != before


def test_code_in_pickled_weights_is_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harmed",))

    start = pickled(tmp_path / "start", small_lm(), 1)
    torch.save({"model.embed_tokens.weight": Harmful()}, start / "pytorch_model.bin")
    with pytest.raises(UserError, match="No causal language model could be loaded"):
        load_causal_lm(start)
    assert not (tmp_path / "harmed").exists()


def test_a_torn_file_is_wrong_input(tmp_path):
    """It would be torn at each of a worker's retries."""
    small_lm().save_pretrained(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="No causal language model could be loaded"):
        load_causal_lm(tmp_path)


def test_a_padded_vocabulary_keeps_its_rows(tmp_path, tiny_llama):
    """More rows than the tokenizer has tokens, as hardware likes it."""
    lm = load_causal_lm(tiny_llama)
    lm.resize_token_embeddings(640, mean_resizing=False)
    lm.save_pretrained(tmp_path / "start")
    model = PolicyModel(load_causal_lm(tmp_path / "start"))
    export(model, tmp_path / "model", tokenizer=str(tiny_llama), card="", dtype=torch.float32)
    assert load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"].shape[0] == 640
    assert json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"] == 640


def test_vllm_gets_no_model_whose_head_it_would_ignore(tmp_path):
    small_lm(tie_word_embeddings=False).save_pretrained(tmp_path)
    assert why_not_vllm(open_model(tmp_path), on_cpu=False) is None
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "a head of their own: vLLM would ignore it" in str(why_not_vllm(open_model(tmp_path), on_cpu=False))
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert why_not_vllm(open_model(tmp_path), on_cpu=False) is None
