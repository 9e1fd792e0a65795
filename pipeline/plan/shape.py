"""The sizes of a model that memory and time follow from, by its config.json alone: no weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otpo.errors import UserError
from pipeline.generate.model_folder import engine_sizes, kv_heads_of


@dataclass(frozen=True)
class Shape:
    """A causal language model without its weights. Sizes are numbers of parameters unless something else is said.

    Attributes:
        name: folder or hub name.
        layers, hidden, heads, vocabulary: as in the config.
        queries, keys: width of a token's queries, and of its keys (values have the same); where values are narrower, as
            in DeepSeek, the mean of both.
        cached: numbers that an engine keeps of a token in each layer.
        middle: width of a token's states inside the feed-forward part; in mixture models of all experts it meets.
        query_norms: whether queries and keys have norms.
        gated: whether the feed-forward part has a gate.
        decoder: all layers together. layer: the largest of them. active: of the decoder, what one token meets.
        linear: of the decoder, the weights of its linear layers, which 4-bit storage holds; 0 for fused experts.
        head: the output head; embeddings: input embeddings. Where `tied`, they are one.
        rest: final norm, positions.
        adapters: trained parameters of the LoRA settings that were asked for, else of rank 16 in all linear layers.
        saved_bytes: of a weight as it was saved.
        shares_prompts: whether training computes a prompt once for both completions.
        recomputes: whether activation checkpointing is known to the architecture.
        engine_sizes: numbers of GPUs that vLLM can share it among.
        routed: experts that a token is sent to, of those that are chosen for it; 0 in dense models.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    queries: int
    keys: int
    cached: int
    middle: int
    query_norms: bool
    gated: bool
    decoder: int
    layer: int
    active: int
    linear: int
    head: int
    embeddings: int
    tied: bool
    rest: int
    adapters: int
    saved_bytes: int
    shares_prompts: bool
    recomputes: bool
    engine_sizes: tuple[int, ...]
    routed: int = 0

    @property
    def parameters(self) -> int:
        """All of them, tied ones once."""
        return self.decoder + self.embeddings + (0 if self.tied else self.head) + self.rest

    @property
    def root(self) -> int:
        """Parameters outside the layers."""
        return self.parameters - self.decoder


def shape_of(path: str | Path, lora: Mapping[str, Any] | None = None, attn_implementation: str = "sdpa") -> Shape:
    """The shape of a model folder, in which only config.json need be, or of a hub name.

    Of a multimodal model it is that of the text model, which alone is trained.

    Args:
        lora: `model.lora` of a recipe.

    Raises:
        UserError: there is no such model, none that can be trained, or adapters that it cannot have.
    """
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    from otpo.models.adapters import add_adapters
    from otpo.models.attention import why_padded
    from otpo.models.disk.architecture import language_config
    from otpo.models.sharding import layers_of

    try:
        config = AutoConfig.from_pretrained(path)
        saved = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        text = language_config(config)
        if text is not config:  # the text model takes over the whole model's head
            text.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)
        with torch.device("meta"):
            lm: Any = AutoModelForCausalLM.from_config(text, dtype=saved)
    except (OSError, ValueError) as error:
        raise UserError(
            f"Expected a model's config.json at '{path}', found none that can be read: {str(error).splitlines()[0]}"
        ) from error
    if not getattr(text, "num_attention_heads", None):
        raise UserError(f"Plans are made of models with attention in each layer, and '{config.model_type}' has none.")
    layers = layers_of(lm)
    decoder = _count(layers)
    experts = sum(p.numel() for m in layers for n, p in m.named_parameters() if "experts" in n and "shared" not in n)
    of_token, all_experts = _experts(text)
    linear = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
    head, embeddings = lm.get_output_embeddings(), lm.get_input_embeddings()
    tied = head.weight is embeddings.weight
    heads = text.num_attention_heads
    width, cached = getattr(text, "head_dim", None) or text.hidden_size // heads, None
    if latent := getattr(text, "kv_lora_rank", None):  # DeepSeek's: an engine keeps what keys and values are made of
        turned = text.qk_rope_head_dim
        width, cached = (text.qk_nope_head_dim + turned + text.v_head_dim) // 2, latent + turned
    values = text.to_dict()
    keys = kv_heads_of(values, heads) * width
    sizes: dict[str, Any] = {
        "decoder": decoder,
        "layer": max((_count([layer]) for layer in layers), default=0),
        "active": decoder - experts + experts * of_token // all_experts,
        "linear": sum(m.weight.numel() for m in linear),
        "head": _count([head]),
        "embeddings": _count([embeddings]),
        "rest": _count([lm]) - decoder - _count([embeddings]) - (0 if tied else _count([head])),
        "adapters": 16 * sum(m.in_features + m.out_features for m in linear),
    }
    if lora is not None:
        add_adapters(lm, dict(lora), seed=0)
        sizes["adapters"] = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    middle = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None)
    middle = middle or 4 * text.hidden_size
    return Shape(
        name=str(path),
        layers=len(layers),
        hidden=text.hidden_size,
        heads=heads,
        vocabulary=text.vocab_size,
        queries=heads * width,
        keys=keys,
        cached=cached or 2 * keys,
        middle=middle * of_token + (_shared_width(text, middle) if all_experts > 1 else 0),
        query_norms=any(module.endswith("q_norm") for module, _ in lm.named_modules()),
        # experts that are one tensor have no modules of their own
        gated=any(name in each for each, _ in lm.named_parameters() for name in ("gate_proj", "gate_up")),
        tied=tied,
        saved_bytes=saved.itemsize,
        shares_prompts=why_padded(text.model_type, attn_implementation) is None,
        recomputes=lm.supports_gradient_checkpointing,
        engine_sizes=tuple(engine_sizes(values, heads)),
        routed=of_token if all_experts > 1 else 0,
        **sizes,
    )


def _count(modules: list[Any]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
OF_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k")
SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
SHARED_WIDTH = ("shared_expert_intermediate_size", "shared_intermediate_size")


def _experts(config: Any) -> tuple[int, int]:
    """Experts that a token meets, and all of a layer, of those that are routed to; 1 and 1 for dense models."""
    number = _first(config, EXPERTS)
    return (_first(config, OF_TOKEN) or 1, number) if number else (1, 1)


def _shared_width(config: Any, middle: int) -> int:
    """Width of the experts that every token meets beside those that it is routed to, each as wide as `middle`."""
    return _first(config, SHARED_WIDTH) or _first(config, SHARED) * middle


def _first(config: Any, names: tuple[str, ...]) -> int:
    """The first of these numbers that a config has, also where it says one for each layer; 0 for none."""
    for place in (config, getattr(config, "ffn_config", None)):
        for name in names:
            if value := getattr(place, name, None):
                return int(max(value) if isinstance(value, list) else value)
    return 0
