"""A tokenizer and a random model from a data file."""

import json

import pytest
import torch
from conftest import SENTENCES
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from otpo.errors import UserError
from otpo.models.fresh import fresh, make_model, make_tokenizer

TOKENIZER = make_tokenizer(SENTENCES, vocab_size=400)


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": text, "chosen": text[::-1], "rejected": text.upper()} for text in SENTENCES]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("tie", [True, False])
def test_the_folder_loads_and_generates_in_transformers(tmp_path, data, architecture, tie):
    shape = {"hidden": 64, "layers": 2, "heads": 2, "kv_heads": 1, "tie": tie}
    folder = fresh(data, tmp_path / "model", architecture=architecture, vocab_size=500, **shape)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == architecture and config.head_dim == 32 and config.max_position_embeddings >= 2048
    assert config.vocab_size == len(tokenizer) <= 500
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(config, name) == getattr(tokenizer, name) == getattr(model.generation_config, name)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Grüß Gott 😀"}], add_generation_prompt=True, return_tensors="pt"
    )
    new = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)[
        0, prompt["input_ids"].shape[1] :
    ]
    assert len(new) == 4
    assert {file.name for file in folder.iterdir()} >= {"model.safetensors", "tokenizer.json", "generation_config.json"}


def test_the_seed_decides_the_weights_and_nothing_else_is_seeded():
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    one, same, other = (make_model(TOKENIZER, hidden=64, heads=2, layers=1, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert "norm" in name or not torch.equal(a, c)


@given(st.text())
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False)["input_ids"]) == text


def test_words_of_the_data_become_tokens():
    assert len(TOKENIZER("The capital of Mongolia", add_special_tokens=False)["input_ids"]) < 12
    assert len(make_tokenizer(SENTENCES, vocab_size=260)("Mongolia", add_special_tokens=False)["input_ids"]) == 8


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"architecture": "gpt2"}, "llama, qwen3, found 'gpt2'"),
        ({"hidden": 96, "heads": 4}, "32, 64 or 128, found 96 / 4"),
        ({"hidden": 128, "heads": 4, "kv_heads": 3}, "kv_heads to divide heads"),
        ({"layers": 0}, "layers >= 1"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_before_anything_is_written(tmp_path, data, settings, expected):
    with pytest.raises(UserError, match=expected):
        fresh(data, tmp_path / "model", **settings)
    assert not (tmp_path / "model").exists()


def test_what_is_there_is_not_overwritten(tmp_path, data):
    folder = tmp_path / "mine"
    folder.mkdir()
    shape = {"vocab_size": 300, "hidden": 64, "layers": 1, "heads": 2, "kv_heads": 1}
    fresh(data, folder, **shape)
    before = (folder / "model.safetensors").read_bytes()
    for there in (folder, data):
        with pytest.raises(UserError, match="Name another folder, or remove"):
            fresh(data, there, seed=1, **shape)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path, data):
    with pytest.raises(UserError, match="at least 260"):
        fresh(data, tmp_path / "model", vocab_size=100)


def test_the_real_pairs_make_a_model(tmp_path, shared_data):
    path = shared_data / "preferences" / "instruction-data-with-preference.json"
    folder = fresh(path, tmp_path / "model", vocab_size=2000, hidden=64, heads=2, layers=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 2000
    assert tokenizer.tokenize("the sentence", add_special_tokens=False) == ["the", "Ġsentence"]
