"""A tiny configuration of any architecture that `AutoModelForCausalLM` knows, from its own config class.

Sizes are set under whatever names a config class has for them (SIZES); what an architecture needs beside that stands in
a row of its own (OWN).
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

VOCABULARY = 320
LARGEST = 20_000_000  # weights; more is not tiny

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "intermediate_size": 48,
    "ffn_dim": 48, "n_inner": 48, "ffn_hidden_size": 48, "num_hidden_layers": 4, "num_layers": 4, "n_layer": 4,
    "n_layers": 4, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2,
    "num_kv_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64, "max_seq_len": 64,
    "initializer_range": 0.2, "init_std": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    # encoders and their decoders
    "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "embedding_size": 32,
    # experts
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "moe_intermediate_size": 24, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1, "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "expert_ffn_hidden_size": 24, "moe_layer_start_index": 1,
    # latent attention
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64,
    # state spaces and linear attention
    "state_size": 8, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 16,
    "mamba_headdim": 16, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_mamba_heads": 4, "mamba_n_groups": 1,
    "n_groups": 1,
    "ssm_state_size": 8, "mamba_chunk_size": 8, "chunk_size": 8, "mamba_d_ssm": 64, "time_step_rank": 4,
    "mamba_dt_rank": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "attention_hidden_size": 32, "lru_width": 32, "attention_window_size": 16, "sliding_window": 16,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    # pictures
    "image_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 32, "out_hidden_size": 32, "projection_dim": 32,
}  # fmt: skip
"""Name of a size in a config class -> tiny."""

SPEAKING: dict[str, Any] = {
    "logit_scale": 0.25, "logits_scaling": 4.0, "lm_head_multiplier": 0.5, "final_logit_softcapping": 3.0,
    "output_logit_soft_cap": 3.0, "logits_soft_cap": 3.0, "output_multiplier": 0.3, "logits_mup_width_multiplier": 2.0,
    "attn_logit_softcapping": 2.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.5,
}  # fmt: skip
"""Settings whose defaults would hide that they are forgotten. Beside them, every dropout and jitter is 0.2."""
RANDOM = re.compile("dropout|pdrop|jitter|layerdrop")
TEXT, VISION, AUDIO = "llama", "siglip_vision_model", "whisper"  # where a wrapper takes any

ALL_HEADS = {"num_key_value_heads": 4}  # latent attention has no groups
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 64,
    "indexer_compress_ratio": 2, "hc_lowrank": 8,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash",
         "minicpm3", "youtu", "kimi_linear"),
        ALL_HEADS,
    ),
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "cpmant": {"dim_head": 8, "dim_ff": 48},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0},
             "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48}},
    "diffllama": {"attention_dropout": 0.0},
    "emu3": {"vocabulary_map": {"<image>": 3}, "vq_config": {"base_channels": 32, "hidden_size": 32}},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 1},
    "gemma3": {"text_config": {"final_logit_softcapping": None}},  # Gemma3ForConditionalGeneration does not read it
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0,
                                         "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 4}},
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text"}},
    "gemma4_unified": {"vision_config": {"mm_embed_dim": 32, "output_proj_dims": 32}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 4},
    "kimi_linear": {**ALL_HEADS, "linear_head_dim": 8, "linear_num_heads": 4,
                    "layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "moshi": {"audio_encoder_config": {"model_type": "mimi"}},
    "musicgen": {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"},
                 "decoder": {"model_type": "musicgen_decoder"}},
    "paligemma": {"text_config": {"model_type": "gemma"}},
    "qwen2_vl": {"text_config": MROPE},
    "qwen2_5_vl": {"text_config": MROPE},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "head_dim": 16, "num_hidden_layers": 6,
              "layers_block_type": ["mamba", "hybrid"] * 3, "num_key_value_heads": 4},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What an architecture needs beside these, its parts in dictionaries of their own; None takes a size away."""

WRAPPERS = (
    "aya_vision", "gemma3", "idefics3", "internvl", "llava", "llava_next", "mistral3", "paligemma", "qwen2_5_vl",
    "qwen2_vl", "qwen3_vl", "smolvlm",
)  # fmt: skip
"""Multimodal models that people give, beside those that `AutoModelForCausalLM` knows."""


def names() -> list[str]:
    """Every value of `config.model_type` that `AutoModelForCausalLM` knows, and the wrappers."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *WRAPPERS})


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """A tiny config of a `model_type`."""
    return _tiny(CONFIG_MAPPING[name], OWN.get(name, {}) | changes)


def _tiny(kind: Any, changes: dict[str, Any]) -> PreTrainedConfig:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    wanted = {name: value for name, value in (SIZES | SPEAKING).items() if name in fields}
    for name, real in kind.attribute_map.items():
        if name in SIZES and real in fields:
            wanted.setdefault(real, SIZES[name])
    wanted |= {name: 0.2 for name, field in fields.items() if RANDOM.search(name) and _takes_a_fraction(field)}
    changes = dict(changes)
    for name, part in kind.sub_configs.items():
        if name in fields:
            own = dict(changes.pop(name, {}))
            of = own.pop("model_type", {"vision_config": VISION, "audio_config": AUDIO}.get(name, TEXT))
            wanted[name] = _tiny(CONFIG_MAPPING[of] if part is AutoConfig else part, own)
    return kind(**{name: value for name, value in (wanted | changes).items() if value is not None})


def _takes_a_fraction(field: dataclasses.Field) -> bool:
    return "float" in str(field.type) and "classifier" not in field.name


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model; norms and biases are random too, or one that is forgotten would not show."""
    multimodal = config.get_text_config() is not config and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    kind = (MODEL_FOR_MULTIMODAL_LM_MAPPING if multimodal else MODEL_FOR_CAUSAL_LM_MAPPING)[type(config)]
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in kind(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} weights: not tiny")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lm = kind(config).float().eval()
        for name, parameter in lm.named_parameters():
            if parameter.dim() == 1 and parameter.requires_grad and "A_log" not in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return lm
