"""Models and rows that cannot be trained are refused in words before anything starts, and what can be is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES
from support.command import nothing_begun, otpo, refused
from support.training import settings, write_pairs
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from otpo.errors import UserError
from otpo.models.disk.architecture import check_language_model, skeleton
from otpo.models.fresh import make_tokenizer
from otpo.models.loading import load_causal_lm
from pipeline.progress import silent
from pipeline.recipe import make_recipe
from pipeline.run.run import open_context

from .tiny import tiny_config, tiny_model

ROWS = 320  # of the tiny models' embeddings; the tokenizer has 300 tokens


def save(lm, folder: Path) -> Path:
    lm.save_pretrained(folder)
    make_tokenizer(SENTENCES, 300).save_pretrained(folder)
    return folder


def checked(folder: Path, model: Path, *, methods: dict | None = None, attention: str = "sdpa", **train):
    """All checks of `otpo train`, as it makes them before Ray starts."""
    tree = settings(folder, model, methods=methods or {"dpo": {}}, train=train)
    tree["model"]["attn_implementation"] = attention
    tree["data"] |= {"template": "literal"}
    return open_context(make_recipe(tree), folder / "run", world=None, progress=silent, redo=False)


def llama(**changes) -> LlamaForCausalLM:
    return tiny_model(tiny_config("llama", **{"max_position_embeddings": 512, **changes}))


def test_a_tiny_model_of_the_tests_passes(tmp_path):
    """The refusals below have one cause each."""
    assert checked(tmp_path, save(llama(), tmp_path / "model")).notes == []


SMALL = {"d_model": 32, "num_heads": 4, "num_layers": 2, "d_kv": 8, "d_ff": 48, "vocab_size": ROWS}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: T5ForConditionalGeneration(T5Config(**SMALL)), ["t5", "encoder-decoder"]),
        (
            lambda: BartForConditionalGeneration(tiny_config("bart", is_encoder_decoder=True)),
            ["bart", "encoder-decoder"],
        ),
        (lambda: tiny_model(tiny_config("bert")), ["bert", "masked language model", "is_decoder"]),
        (
            lambda: AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=1)),
            ["LlamaForSequenceClassification", "no head over the vocabulary"],
        ),
        (lambda: tiny_model(tiny_config("mllama")), ["mllama", "multimodal", "Gemma 3"]),
        (lambda: tiny_model(tiny_config("mamba")), ["mamba", "model.attn_implementation=eager"]),
    ],
    ids=["t5", "bart", "bert", "classifier", "mllama", "mamba"],
)
def test_an_architecture_that_the_loop_cannot_take(tmp_path, model, words):
    with pytest.raises(UserError) as error:
        checked(tmp_path, save(model(), tmp_path / "model"))
    assert all(word in str(error.value) for word in [*words, str(tmp_path / "model")]), error.value


@pytest.mark.parametrize("named", ["LlamaForSequenceClassification", ["LlamaForSequenceClassification"], [None]])
def test_the_class_of_the_weights_is_known_however_it_is_written(tmp_path, named):
    model = save(llama(), tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"architectures": named}
    (model / "config.json").write_text(json.dumps(config))
    if named == [None]:
        return checked(tmp_path, model)
    with pytest.raises(UserError, match="LlamaForSequenceClassification has no head over the vocabulary"):
        checked(tmp_path, model)


def test_the_ways_out_that_refusals_name_are_ways_out(tmp_path):
    mamba = save(tiny_model(tiny_config("mamba")), tmp_path / "mamba")
    checked(tmp_path, mamba, attention="eager")
    decoder = save(tiny_model(tiny_config("bert-generation", is_decoder=True)), tmp_path / "decoder")
    assert check_language_model(decoder).tokens == ROWS


def test_a_reward_model_may_start_from_a_classifier(tmp_path):
    lm = AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=1, max_position_embeddings=512))
    checked(tmp_path, save(lm, tmp_path / "model"), methods={"reward-model": {}})


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            lambda: AutoModelForSequenceClassification.from_config(tiny_config("llama", num_labels=2)),
            "classifier with 2 labels",
        ),
        (lambda: tiny_model(tiny_config("gptj")), "model.attn_implementation=eager"),
        (lambda: tiny_model(tiny_config("gemma3")), "multimodal model.*give a language model"),
        (lambda: tiny_model(tiny_config("cohere")), "no classifier of the architecture 'cohere'"),
    ],
    ids=["two labels", "eager only", "multimodal", "no classifier"],
)
def test_what_a_reward_model_cannot_start_from(tmp_path, model, words):
    with pytest.raises(UserError, match=words):
        checked(tmp_path, save(model(), tmp_path / "model"), methods={"reward-model": {}})


def test_an_architecture_without_activation_checkpointing(tmp_path):
    model = save(tiny_model(tiny_config("ctrl", n_positions=512)), tmp_path / "model")
    checked(tmp_path, model)
    with pytest.raises(UserError, match=r"train.activation_checkpointing.*Set it to false"):
        checked(tmp_path, model, activation_checkpointing=True)


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_folder_is_refused_and_its_base_named(tmp_path, whole):
    """transformers would put an adapter that lies beside a model into it, without a word."""
    from peft import LoraConfig, get_peft_model

    base = save(llama(), tmp_path / "base")
    model = get_peft_model(load_causal_lm(base), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    torch.nn.init.ones_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    if whole:
        save(llama(), adapter)
    with pytest.raises(UserError) as error:
        checked(tmp_path, adapter)
    assert f"is an adapter of the model '{base}'" in str(error.value)
    command = str(error.value).partition('python -c "')[2].rstrip('"')
    if not whole:  # the command that the message gives makes a model of the two
        AutoTokenizer.from_pretrained(base).save_pretrained(adapter)
        exec(command.replace("'merged'", repr(str(tmp_path / "merged"))))
        checked(tmp_path, tmp_path / "merged")
        ids = torch.arange(5, 15)[None]
        torch.testing.assert_close(load_causal_lm(tmp_path / "merged")(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 3, "head_dim": None}, "validate_architecture': .*hidden size .* multiple"),
        ({"rope_parameters": {"rope_type": "unheard"}}, "cannot build a 'llama' from this config: KeyError: 'unheard'"),
    ],
)
def test_a_configuration_that_transformers_refuses_is_told_with_the_reason(tmp_path, changes, words):
    model = save(llama(), tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        checked(tmp_path, model)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read .* Copy the adapter anew"),
        ("[]", "cannot be read .* Copy the adapter anew"),
        ('{"peft_type": "LORA", "base_model_name_or_path": null}', "names no base: .* as base_model_name_or_path"),
        ('{"peft_type": "LORA", "base_model_name_or_path": "./none"}', "The base is not there: .* Merge the two"),
        ('{"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "b"}', "cannot be merged .* Give the base"),
    ],
)
def test_an_adapter_that_cannot_be_merged_as_it_is(tmp_path, text, words):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=words):
        checked(tmp_path, tmp_path / "adapter")


def test_code_of_its_own_is_not_run(tmp_path):
    model = save(llama(), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text("raise SystemExit('run')")
    with pytest.raises(UserError, match="a model of transformers"):
        checked(tmp_path, model)


def test_a_token_that_the_model_has_no_embedding_for(tmp_path):
    model = save(llama(), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    added = [f"<extra_{i}>" for i in range(ROWS - 300 + 1)]  # one more than the embeddings' padding has room for
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(model)
    rows = json.loads(write_pairs(tmp_path / "pairs.json").read_text())
    rows[3]["chosen"] += f" {added[-2]}"
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    checked(tmp_path, model)  # a padded vocabulary has room for it
    rows[5]["rejected"] += f" {added[-1]}"
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    with pytest.raises(UserError) as error:
        checked(tmp_path, model)
    assert f"{len(tokenizer) - 1} '{added[-1]}'" in str(error.value) and "resize_token_embeddings" in str(error.value)


def long_rows(folder: Path) -> int:
    """Pairs, one of them with long text; tokens of its longer side."""
    rows = json.loads(write_pairs(folder / "pairs.json").read_text())
    rows[7]["chosen"] = " ".join(SENTENCES)
    (folder / "pairs.json").write_text(json.dumps(rows))
    tokenizer = make_tokenizer(SENTENCES, 300)
    return len(tokenizer(rows[7]["prompt"]).input_ids) + len(tokenizer(rows[7]["chosen"]).input_ids)


POSITIONS = 400
TABLES = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=ROWS, n_embd=32, n_layer=2, n_head=4, n_positions=POSITIONS)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=ROWS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
            word_embed_proj_dim=32, max_position_embeddings=POSITIONS,
        )
    ),
    "llama": lambda: llama(max_position_embeddings=POSITIONS),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_rows_with_more_tokens_than_the_model_has_positions(tmp_path, name):
    model = save(TABLES[name](), tmp_path / "model")
    checked(tmp_path, model)
    longest = long_rows(tmp_path)
    with pytest.raises(UserError) as error:
        checked(tmp_path, model)
    for word in ("1 of", f"{POSITIONS} positions", f"data.max_length={POSITIONS}", "row 7", f"{longest} tokens"):
        assert word in str(error.value), error.value
    assert ("table" in str(error.value)) == (name != "llama")


def test_positions_without_an_end(tmp_path):
    """ALiBi is a bias by distance: config.json names positions, and nothing ends there."""
    model = save(tiny_model(tiny_config("falcon", alibi=True)), tmp_path / "model")
    assert check_language_model(model).positions is None
    assert check_language_model(save(tiny_model(tiny_config("gpt2")), tmp_path / "gpt2")).positions == 64


def test_rows_of_which_a_sparse_indexer_leaves_tokens_out(tmp_path):
    """Which ones depends on the padding beside them, in transformers itself."""
    config = tiny_config("deepseek_v32", max_position_embeddings=512, index_topk=64)
    model = save(tiny_model(config), tmp_path / "model")
    longest = long_rows(tmp_path)
    with pytest.raises(UserError, match=rf"the 64 positions of {model} \(config.json: index_topk.*{longest} tokens"):
        checked(tmp_path, model)


def test_a_frozen_model_of_another_tokenizer(tmp_path):
    """Of the same size; and a vocabulary that is padded further is no other tokenizer."""
    model = save(llama(), tmp_path / "model")
    padded = save(llama(vocab_size=ROWS + 64), tmp_path / "padded")
    other = save(llama(), tmp_path / "other")
    make_tokenizer(SENTENCES[::-1] + ["zebras zip zealously"] * 9, 300).save_pretrained(other)
    small = save(llama(vocab_size=280), tmp_path / "small")
    for oracle in (save(llama(), tmp_path / "trained"), padded):
        checked(tmp_path, model, methods={"sepo": {"oracle": str(oracle)}})
    with pytest.raises(
        UserError, match=r"methods.sepo.oracle: .*other has another tokenizer.*\d+ tokens have other ids"
    ):
        checked(tmp_path, model, methods={"sepo": {"oracle": str(other)}})
    with pytest.raises(UserError, match=r"methods.sepo.oracle: .*small has embeddings for 280 tokens.*reads 300"):
        checked(tmp_path, model, methods={"sepo": {"oracle": str(small)}})


def test_a_multimodal_model_is_read_through_its_text_model(tmp_path):
    config = tiny_config("gemma3")
    config.text_config.max_position_embeddings = 512
    model = save(tiny_model(config), tmp_path / "model")
    (note,) = checked(tmp_path, model).notes
    assert "text model alone (Gemma3ForCausalLM)" in note
    assert type(load_causal_lm(model)).__name__ == "Gemma3ForCausalLM"


def test_a_text_model_that_does_not_compute_what_the_whole_does(tmp_path):
    """Gemma3ForConditionalGeneration does not read the soft cap that Gemma3ForCausalLM reads."""
    config = tiny_config("gemma3")
    config.text_config.final_logit_softcapping = 3.0
    model = save(tiny_model(config), tmp_path / "model")
    with pytest.raises(UserError, match="gives other log-probabilities than the whole model"):
        load_causal_lm(model)


def test_an_8b_model_is_looked_at_in_a_moment():
    """Its configuration is enough: no weight takes memory."""
    config = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_key_value_heads=8)
    lm = skeleton(config)
    assert all(parameter.is_meta for parameter in lm.parameters())


@pytest.mark.slow
def test_the_command_refuses_before_ray_starts(tmp_path):
    long_rows(tmp_path)
    save(TABLES["gpt2"](), tmp_path / "model")
    tree = settings(tmp_path, tmp_path / "model", methods={"dpo": {}})
    tree["data"] |= {"template": "literal"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    refused(otpo(tmp_path, "train", "recipe.yaml"), f"{POSITIONS} positions", f"data.max_length={POSITIONS}")
    nothing_begun(tmp_path)


def test_a_class_that_clears_the_padding_tokens_embedding_is_refused_and_the_way_out_works(tmp_path):
    model = tiny_model(tiny_config("youtu", pad_token_id=7))
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = 1.0
    model.save_pretrained(tmp_path)
    assert not type(model).from_pretrained(tmp_path).get_input_embeddings().weight[7].any()
    with pytest.raises(UserError, match=r"padding token \(id 7\).*Remove `pad_token_id`"):
        check_language_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["pad_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_language_model(tmp_path)
    assert load_causal_lm(tmp_path).get_input_embeddings().weight[7].all()
