"""A small random Llama and three pairs of token ids for it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from otpo.records import TokenPair

PAIRS = [
    TokenPair(0, [5, 6, 7], [8, 9, 10, 11, 12], [13, 14]),
    TokenPair(1, [21], [22], [23, 24, 25, 26, 27, 28, 29]),
    TokenPair(2, [31, 32, 33, 34, 35, 36], [37, 38, 39], [40, 41, 42]),
]
SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip


def small_lm(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).eval()
