"""Rotary positions whose frequencies depend on the length of a sequence (`rope_type` longrope or dynamic).

transformers chooses them once for a whole batch, by its largest position: a short sequence beside a long one would get
other log-probabilities than alone. Here each sequence gets those of its own length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def rotate_by_own_length(lm: nn.Module) -> int | None:
    """Let a model's rotary embeddings look at each sequence's own positions, in place.

    `position_ids` (S, L) must then be given with each batch, and be at most a sequence's length - 1, padding included.

    Returns:
        The length up to which all sequences have the same frequencies, so that they can share a prompt; None where
        length changes nothing.
    """
    limits = []
    modules: list[Any] = list(lm.modules())
    for module in modules:
        kinds = getattr(module, "rope_type", None)
        kinds = set(kinds.values() if isinstance(kinds, dict) else [kinds])
        if any(kind == "longrope" or "dynamic" in kind for kind in kinds if kind):
            module.forward = _each_alone(module.forward)
            limits.append(_limit(module))
    return min(limits, default=None)


def _each_alone(forward: Callable[..., Any]) -> Callable[..., Any]:
    def each_alone(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        parts = [forward(x[:1], row[None], *args, **kwargs) for row in position_ids]
        return tuple(map(torch.cat, zip(*parts, strict=True))) if isinstance(parts[0], tuple) else torch.cat(parts)

    return each_alone


def _limit(module: Any) -> int:
    parameters = module.config.rope_parameters
    each = [parameters] if "rope_type" in parameters else [part for part in parameters.values() if part]
    found = [part.get("original_max_position_embeddings") for part in each if part["rope_type"] == "longrope"]
    return min(filter(None, found), default=module.original_max_seq_len)
