"""What GPU kernels are compared with: the same in float64 on the CPU, one sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def one_by_one(query, key, value, segments, sequences, *, window=None, scaling=None):
    """Each sequence by torch's attention with a whole mask. A prompt's states come from its first sequence.

    Args:
        query: (1, H, N, E). key, value: (1, G, N, E). segments, sequences: of a `SequenceBatch`.

    Returns:
        (1, N, H, E).
    """
    outputs = {}
    pieces = [x.split(segments, dim=2) for x in (query, key, value)]
    for prompt, completion in sequences:
        q, k, v = (torch.cat([piece[prompt], piece[completion]], dim=2) for piece in pieces)
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        mask = (distance >= 0) & (distance < (window or q.shape[2]))
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True).transpose(1, 2)
        head, tail = mixed.split([segments[prompt], segments[completion]], dim=1)
        outputs.setdefault(prompt, head)
        outputs[completion] = tail
    return torch.cat([outputs[index] for index in range(len(segments))], dim=1)


def error(found: Tensor, exact: Tensor) -> float:
    """How far a tensor is from the exact one, as a fraction of its norm."""
    exact = exact.double().cpu()
    return ((found.double().cpu() - exact).norm() / exact.norm()).item()
