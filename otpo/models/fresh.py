"""A tokenizer trained on a data file and a random model for it, for trials where no model can be downloaded.

otpo fresh pairs.json --out models/fresh
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from otpo.data.convert import convert
from otpo.data.load import load_rows
from otpo.data.rows import content
from otpo.errors import UserError
from otpo.models.loading import no_bars

MAX_LENGTH = 2048
PAD, BOS, START, END = "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"

# ChatML after a BOS; a newline follows the end of turn, as in the templates of released models
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

ARCHITECTURES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def fresh(data: str | Path, out: Path, *, vocab_size: int = 4096, **shape: Any) -> Path:
    """Train a tokenizer on the texts of a data file and save it with a random model as a Hugging Face folder.

    Args:
        data: a preference or `{prompt, completion}` file of any format that `otpo.data.load.load_rows` reads.
        out: the folder, which is made; there may be an empty one.
        vocab_size: the most tokens that the tokenizer may have; little text gives fewer.
        **shape: architecture, hidden, layers, heads, kv_heads, intermediate, tie and seed of `make_model`.

    Returns:
        out.

    Raises:
        UserError: there is something at `out`, no usable data, or a shape that `make_model` refuses.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(
            f"{out}: expected a new folder, found {'one with files in it' if out.is_dir() else 'a file'}: a model there"
            " would be lost. Name another folder, or remove this one first."
        )
    examples, _ = convert(load_rows(str(data)), str(data))
    tokenizer = make_tokenizer((content(text) for e in examples for text in (e.prompt, *e.completions)), vocab_size)
    model = make_model(tokenizer, **shape)
    with no_bars():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def make_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which encodes any text and decodes it unchanged.

    It has pad, BOS and EOS (end of turn) tokens and a ChatML template, and puts BOS before a text, as Llama's does.

    Raises:
        UserError: `vocab_size` has no room for the 256 bytes and the 4 special tokens.
    """
    if vocab_size < 260:
        raise UserError(f"vocab_size is at least 260 (256 bytes and 4 special tokens), found {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (PAD, BOS, START, END)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    architecture: str = "llama",
    hidden: int = 128,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int | None = None,
    intermediate: int | None = None,
    tie: bool = True,
    seed: int = 0,
) -> PreTrainedModel:
    """A random float32 model for a tokenizer's vocabulary. The caller's random state does not change.

    Args:
        tokenizer: gives the vocabulary's size and the ids of BOS, EOS and padding.
        architecture: "llama" or "qwen3".
        hidden: hidden size; hidden / heads must be 32, 64 or 128, which every generation engine's attention knows.
        layers: number of blocks.
        heads: attention heads.
        kv_heads: key and value heads, a divisor of heads; None: as many.
        intermediate: MLP size; None: 8 / 3 of hidden, rounded up to a multiple of 32.
        tie: whether the head shares the embedding's weight.
        seed: of the weights.

    Raises:
        UserError: an unknown architecture, or sizes that do not fit together.
    """
    if architecture not in ARCHITECTURES:
        raise UserError(f"architecture is one of {', '.join(ARCHITECTURES)}, found '{architecture}'")
    kv_heads = kv_heads or heads
    if heads < 1 or hidden not in (32 * heads, 64 * heads, 128 * heads):
        raise UserError(f"expected hidden / heads to be 32, 64 or 128, found {hidden} / {heads}")
    if heads % kv_heads or layers < 1:
        raise UserError(f"expected kv_heads to divide heads, and layers >= 1; found {kv_heads=}, {heads=}, {layers=}")
    config_class, model_class = ARCHITECTURES[architecture]
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate or -(-8 * hidden // 96) * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=tie,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).float()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model
