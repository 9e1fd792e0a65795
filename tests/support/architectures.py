"""Small causal language models of the architectures that people tune, and pairs of token ids for them."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from otpo.records import TokenPair

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW = {"sliding_window": 4, "use_sliding_window": True}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_local_experts": 4}
FAMILIES = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen2-window": {**WINDOW, "max_window_layers": 1},
    "qwen3": {},
    "mistral-window": WINDOW,
    "gemma": {},
    "gemma2-window": {
        **WINDOW,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 2.0,
        "query_pre_attn_scalar": 4,
    },
    "gemma3_text-window": {
        **WINDOW,
        "query_pre_attn_scalar": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": {},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "granite": {
        "logits_scaling": 8.0,
        "attention_multiplier": 0.5,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 3.0,
    },
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    # not in ARCHITECTURES: padded
    "cohere": {"logit_scale": 0.25},
    "phi": {},
    "gpt_neox": {},
}
PAIRS = [
    TokenPair(0, [5, 6, 7, 8, 9], [8, 9, 10, 11, 12, 13, 14], [13, 14]),
    TokenPair(1, [21], [22], [23, 24, 25, 26, 27, 28, 29]),
    TokenPair(2, [31, 32, 33, 34, 35, 36], [37, 38, 39], [40, 41, 42]),
]
SEQUENCES = [(p.prompt_ids, p.chosen_ids) for p in PAIRS] + [(p.prompt_ids, p.rejected_ids) for p in PAIRS]


def make(family: str, attention: str):
    name = family.split("-")[0]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SHAPE, **FAMILIES[family])
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in lm.parameters():  # norms and biases too, or a forgotten one would not show
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return lm
