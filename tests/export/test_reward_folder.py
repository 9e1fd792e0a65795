"""An exported reward model, read by plain transformers through its own tokenizer, gives the trained scores."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES
from tokenizers import processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from otpo.data.collate import collate_pairs
from otpo.data.template import Rendering
from otpo.data.tokens import tokenize_pairs
from otpo.errors import UserError
from otpo.models.disk.reward_tokenizer import NEW_PAD, check_template, for_scoring, pad_token
from otpo.models.export import export
from otpo.models.fresh import make_tokenizer
from otpo.models.reward_model import RewardModel, RewardScorer, load_reward_lm
from pipeline.train.job import TrainJob

CHATML = (
    "\n{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}\n{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{{ message['role'].upper() }}: {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ROWS = [
    {"prompt": f"Question {i}: {SENTENCES[i][:30]}", "chosen": SENTENCES[-i][: 20 + 9 * i], "rejected": "No idea. " * i}
    for i in range(1, 6)
]


def tokenizer_with(**tokens) -> PreTrainedTokenizerFast:
    """A tokenizer that has these special tokens alone, and puts none before a text."""
    inner = make_tokenizer(SENTENCES, 400).backend_tokenizer
    inner.post_processor = processors.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **tokens)


KINDS = {
    "all specials are EOS, as GPT-2's": dict.fromkeys(("eos_token", "pad_token", "bos_token"), "<|im_end|>"),
    "no padding token at all": {"eos_token": "<|im_end|>"},
    "turns end otherwise than texts, as in Qwen's base models": {
        "eos_token": "<|pad|>", "pad_token": "<|pad|>", "additional_special_tokens": ["<|im_end|>", "<|im_start|>"],
    },
    "padding is unknown": {"eos_token": "<|im_end|>", "pad_token": "<|bos|>", "unk_token": "<|bos|>"},
    "padding of its own": {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "bos_token": "<|bos|>"},
}  # fmt: skip


def causal_lm(kind: str, tokenizer: PreTrainedTokenizerFast):
    torch.manual_seed(0)
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=256, initializer_range=0.3, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def trained(folder: Path, tokenizer, template: str, model: str, **kwargs) -> tuple[list[float], Path]:
    """The scores of all completions as a reward model is trained on them, chosen first, and its exported folder."""
    causal_lm(model, tokenizer).save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    pairs, report = tokenize_pairs(ROWS, tokenizer, template=template, chat_template_kwargs=kwargs)
    pad = pad_token(tokenizer, {ids[-1] for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)})
    reward = RewardModel(load_reward_lm(folder / "start", new_head=True, pad_id=pad)).eval()
    torch.nn.init.normal_(reward.lm.score.weight, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        scores = reward.scores(collate_pairs(pairs)).tolist()
    out = folder / "model"
    export(
        reward,
        out,
        tokenizer=str(folder / "start"),
        card="",
        dtype=torch.float32,
        pad_id=pad,
        template=report.rendering,
    )
    return scores, out


def read(folder: Path, template: str, side: str | None) -> list[float]:
    """What someone with transformers alone gets, all texts in one batch; `side` None is the tokenizer's own."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = [(row["prompt"], row[name]) for name in ("chosen", "rejected") for row in ROWS]
    if template == "chat":
        turns = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": text}] for prompt, text in rows]
        texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in turns]
    else:
        texts = [prompt + text + tokenizer.eos_token for prompt, text in rows]
    inputs = tokenizer(
        texts, padding=True, return_tensors="pt", add_special_tokens=template == "literal",
        **({"padding_side": side} if side else {}),
    )  # fmt: skip
    with torch.no_grad():
        return lm(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0].tolist()


@pytest.mark.parametrize("template", ["literal", "chat"])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_reads_the_trained_scores(tmp_path, kind, template):
    tokenizer = tokenizer_with(**KINDS[kind], chat_template=CHATML)
    scores, folder = trained(tmp_path, tokenizer, template, "llama")
    assert max(scores) - min(scores) > 0.5
    for side in (None, "right", "left"):
        assert read(folder, template, side) == pytest.approx(scores, abs=1e-4), side
    rows = [(row["prompt"], row[name]) for name in ("chosen", "rejected") for row in ROWS]
    assert RewardScorer(folder, batch_size=3)(*zip(*rows, strict=True)) == pytest.approx(scores, abs=1e-4)


def test_a_template_whose_turns_end_in_no_special_token(tmp_path):
    tokenizer = tokenizer_with(**KINDS["no padding token at all"], chat_template=PLAIN)
    scores, folder = trained(tmp_path, tokenizer, "chat", "llama")
    for side in ("right", "left"):
        assert read(folder, "chat", side) == pytest.approx(scores, abs=1e-4)


def test_variables_of_the_chat_template_go_into_the_folder(tmp_path):
    """Its readers give none: their conversations must be rendered as training's were."""
    thinking = CHATML.replace(
        "{{ message['content'] }}",
        "{% if message['role'] == 'user' and not enable_thinking | default(true) %}/no_think {% endif %}"
        "{{ message['content'] }}",
    )
    tokenizer = tokenizer_with(**KINDS["padding of its own"], chat_template=thinking)
    scores, folder = trained(tmp_path, tokenizer, "chat", "llama", enable_thinking=False)
    assert read(folder, "chat", "right") == pytest.approx(scores, abs=1e-4)
    ids, plain = (
        each.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        for each in (AutoTokenizer.from_pretrained(folder), tokenizer)
    )
    assert "/no_think" in ids and "/no_think" not in plain


def test_a_job_reaches_its_worker_as_it_was_made(tmp_path):
    """Its template is written into the exported folder, for whoever renders prompts for the model."""
    for template in ("chat and literal", Rendering("chat", {"enable_thinking": False}), Rendering("literal")):
        job = TrainJob(
            label="rm", model="m", model_fingerprint="", attn_implementation="sdpa", tokens="", validation_tokens=None,
            out="", events="", train={}, total_steps=1, method=None, frozen_models={}, caches="", tokens_hash="",
            card="", template=template,
        )  # fmt: skip
        assert TrainJob(**json.loads(json.dumps(asdict(job)))) == job


def test_a_template_that_renders_finished_conversations_otherwise_is_refused(tmp_path):
    """It opens the answer's reasoning for generation only, so a finished conversation has no such token."""
    opened = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = tokenizer_with(**KINDS["padding of its own"], chat_template=opened)
    check_template(tokenizer, "literal")
    with pytest.raises(UserError, match=r"renders a finished conversation with other tokens.*data\.template=literal"):
        check_template(tokenizer, "chat")
    for sound in (CHATML, PLAIN):
        check_template(tokenizer_with(**KINDS["padding of its own"], chat_template=sound), "chat")


def test_learned_positions_are_padded_on_the_right(tmp_path):
    tokenizer = tokenizer_with(**KINDS["all specials are EOS, as GPT-2's"], padding_side="left")
    scores, folder = trained(tmp_path, tokenizer, "literal", "gpt2")
    assert read(folder, "literal", None) == pytest.approx(scores, abs=1e-4)


def test_the_chat_template_of_the_folder_only_ends_otherwise(tmp_path):
    tokenizer = tokenizer_with(**KINDS["padding of its own"], chat_template=CHATML)
    _, folder = trained(tmp_path, tokenizer, "chat", "llama")
    saved = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": role, "content": f"{role}\n "} for role in ("system", "user", "assistant", "user", "assistant")]
    for count in range(1, 6):
        for prompt in (True, False):
            before, after = (
                each.apply_chat_template(turns[:count], tokenize=False, add_generation_prompt=prompt)
                for each in (tokenizer, saved)
            )
            assert after == (before if prompt else before.rstrip())


def test_several_templates_with_names_all_end_where_training_does():
    """As of models that have another template for tools."""
    tokenizer = tokenizer_with(eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"])
    tokenizer.chat_template = {"default": CHATML, "tool_use": CHATML}
    check_template(tokenizer, Rendering("chat"))
    ended = for_scoring(copy.deepcopy(tokenizer), pad_token(tokenizer), Rendering("chat"))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for name in ("default", "tool_use"):
        trained, before = (
            each.apply_chat_template(messages, tokenize=False, chat_template=each.chat_template[name])
            for each in (ended, tokenizer)
        )
        assert trained == before.rstrip() != before
    tokenizer.chat_template = {
        "default": CHATML,
        "tool_use": CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
    }
    with pytest.raises(UserError, match="renders a finished conversation with other tokens"):
        check_template(tokenizer, Rendering("chat"))


def test_a_padding_token_is_added_only_where_completions_end_in_every_other(tmp_path):
    only_eos = tokenizer_with(**KINDS["no padding token at all"])
    assert pad_token(only_eos) == len(only_eos)
    _, folder = trained(tmp_path, only_eos, "literal", "llama")
    saved = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert (saved.pad_token, saved.pad_token_id) == (NEW_PAD, len(only_eos)) and len(saved) == len(only_eos) + 1
    assert (config["vocab_size"], config["pad_token_id"]) == (len(saved), len(only_eos))
    own = tokenizer_with(**KINDS["padding of its own"])
    assert pad_token(own) == own.pad_token_id
    assert pad_token(own, {own.pad_token_id}) == own.bos_token_id
    assert pad_token(own, {own.pad_token_id, own.bos_token_id}) == len(own)
