"""Attention over sequences that share their prompts.

The flat layout of `SequenceBatch` goes through the model as one row of N tokens. Everything but attention works on each
token alone, so a shared prompt is computed once and no sequence is padded. Attention puts the sequences together again:
the keys and values of a prompt stand before those of each of its completions. On a CPU `otpo.kernels.cpu.attention`
computes it, on a GPU in half precision one call of flash attention (`otpo.kernels.varlen`). Otherwise (in float32 on a
GPU, with a soft cap, for long sequences on a CPU) torch's causal kernels take one sequence at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from otpo.kernels.cpu import uses_cpu_kernels
from otpo.kernels.cpu.attention import blocked_attention, plan_of
from otpo.kernels.varlen import takes_varlen, varlen_attention
from otpo.records import SequenceBatch

SHARED_PROMPTS = "shared_prompts"
ARCHITECTURES = frozenset(
    {
        "llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2",
        "smollm3", "granite",
    }
)  # fmt: skip
"""Values of `config.model_type` in which only attention mixes tokens, through transformers' attention interface."""

LONGEST = 2048  # tokens; a CPU does not keep the attention probabilities of longer sequences for backward


def shared_prompts_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    batch: SequenceBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each sequence, for transformers' `AttentionInterface`.

    Args:
        module, attention_mask: part of the interface, not used.
        query: (1, H, N, E).
        key, value: (1, G, N, E) with H a multiple of G.
        batch: whose tokens these are. Tokens beyond its own are padding (`otpo.kernels.cpu.buckets`): they get 0.
        scaling: factor on the scores.
        sliding_window: how many tokens, itself included, a token sees.
        softcap: the scores' soft cap (Gemma 2).

    Returns:
        (1, N, H, E), None.
    """
    segments, sequences, longest = batch.segments, batch.sequences, max(batch.lengths)
    window = _narrower(sliding_window, longest)
    if batch.varlen is not None and takes_varlen(query, softcap):
        q, k, v = (x.squeeze(0) for x in (query, key, value))  # a view in backward too, unlike x[0]
        return varlen_attention(q, k, v, batch.varlen, scale=scaling, window=window)[None], None
    # 0 * NaN is NaN: blocks hold several sequences, and one that is not finite would spoil the others
    if uses_cpu_kernels(query) and softcap is None and longest <= LONGEST and (key.sum() + value.sum()).isfinite():
        heads, groups = query.shape[1], key.shape[1]
        plan = plan_of(
            segments, sequences, tokens=query.shape[2], window=window, heads=heads, groups=groups, dtype=query.dtype
        )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return blocked_attention(query[0], key[0], value[0], plan, scale)[None], None
    padding = query.shape[2] - sum(segments)
    queries, keys, values = (x.split([*segments, padding], dim=2) for x in (query, key, value))
    outputs: list[Tensor | None] = [None] * len(segments)
    for prompt, completion in sequences:
        q, k, v = (torch.cat([x[prompt], x[completion]], dim=2) for x in (queries, keys, values))
        length = q.shape[2]
        window = _narrower(sliding_window, length)
        if softcap is not None:
            mixed = _softcapped(q, k, v, scaling, _causal(length, window, q.device), softcap)
        elif window is not None:
            mask = _causal(length, window, q.device)
            mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)
        else:
            mixed = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        head, tail = mixed.transpose(1, 2).split([segments[prompt], segments[completion]], dim=1)
        if outputs[prompt] is None:
            outputs[prompt] = head
        outputs[completion] = tail
    outputs.append(torch.zeros_like(queries[-1]).transpose(1, 2))
    return torch.cat([output for output in outputs if output is not None], dim=1), None


def why_padded(model_type: str, attn_implementation: str) -> str | None:
    """Why a model's batches are padded and a prompt computed once for each completion; None if prompts are shared."""
    if model_type not in ARCHITECTURES:
        return f"'{model_type}' is not among the architectures that share prompts ({', '.join(sorted(ARCHITECTURES))})"
    if attn_implementation != "sdpa":
        return f"model.attn_implementation is {attn_implementation}: only sdpa shares prompts"
    return None


def share_prompts(lm: PreTrainedModel) -> bool:
    """Let a model take flat batches if it can, in place; whether it can.

    It must be of a known architecture and loaded with `sdpa`.
    """
    if why_padded(lm.config.model_type, lm.config._attn_implementation):
        return False
    AttentionInterface.register(SHARED_PROMPTS, shared_prompts_attention)
    lm.set_attn_implementation(SHARED_PROMPTS)
    return True


def _narrower(window: int | None, length: int) -> int | None:
    """A sliding window, if sequences of this length have tokens beyond it."""
    return window if window is not None and window < length else None


def _causal(length: int, window: int | None, device: torch.device) -> Tensor:
    """(L, L) bool: which tokens (columns) each token sees."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None, :]
    return (distance >= 0) & (distance < (length if window is None else window))


def _softcapped(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, mask: Tensor, softcap: float) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
