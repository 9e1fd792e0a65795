"""Attention over sequences that share their prompts, as one call of torch's variable-length flash attention.

A GPU is bound by launches where attention takes one sequence at a time: some 40 for each sequence and layer. Here each
layer has two gathers and one call, whatever the number of sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from otpo.records import VarlenPlan

LARGEST_HEAD = 256  # dimensions, of flash attention


def takes_varlen(query: Tensor, softcap: float | None) -> bool:
    """Whether flash attention can compute a layer: on a GPU, in half precision, without a soft cap."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and softcap is None and query.shape[-1] <= LARGEST_HEAD


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: VarlenPlan,
    *,
    scale: float | None = None,
    window: int | None = None,
    kernel: Callable[..., Any] = varlen_attn,
) -> Tensor:
    """Causal attention of each sequence.

    Args:
        query: (H, N, E).
        key, value: (G, N, E) with H a multiple of G.
        scale: factor on the scores; None is E ** -0.5.
        window: how many tokens, itself included, a token sees; None sees all before it.
        kernel: with the interface of `torch.nn.attention.varlen.varlen_attn`.

    Returns:
        (N, H, E).
    """
    queries, keys, values = (x.transpose(0, 1) for x in (query, key, value))
    return kernel(
        queries,
        keys.index_select(0, plan.keys),  # its backward adds up without waiting, that of indexing by a tensor sorts
        values.index_select(0, plan.keys),
        plan.query_starts,
        plan.key_starts,
        plan.longest_query,
        plan.longest_key,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
