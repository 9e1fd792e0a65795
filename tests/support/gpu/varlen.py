"""What torch's variable-length flash attention computes, on a CPU: it exists for GPUs alone."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from otpo.models import attention


def emulated_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`: each sequence's last query stands at its last key.

    A query at place i sees the keys from i - window_size[0] to i + window_size[1]; -1 is no limit.
    """
    assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
    assert enable_gqa or query.shape[1] == key.shape[1]
    outputs = []
    cut = ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k))
    for q, k, v in zip(*(x.tensor_split(starts[1:-1].long()) for x, starts in cut), strict=True):
        places = torch.arange(len(q))[:, None] + len(k) - len(q)
        distance = places - torch.arange(len(k))
        seen = torch.ones_like(distance, dtype=torch.bool)
        if window_size[0] >= 0:
            seen &= distance <= window_size[0]
        if window_size[1] >= 0:
            seen &= distance >= -window_size[1]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("ihe,jhe->hij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        outputs.append(torch.einsum("hij,jhe->ihe", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


class _InOne(torch.autograd.Function):
    """One call forward and one backward, each in a context, as a kernel has them."""

    @staticmethod
    def forward(ctx, counting, call, *inputs):
        ctx.counting, ctx.call = counting, call
        ctx.save_for_backward(*inputs)
        with counting():
            return call(*inputs)

    @staticmethod
    def backward(ctx, grad):
        with ctx.counting(), torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            return None, None, *torch.autograd.grad(ctx.call(*inputs), inputs, grad)


def through_varlen(monkeypatch, counting=nullcontext) -> list[int]:
    """Let attention of batches with a plan go through the emulation; the list grows by one for each call.

    Args:
        counting: a context that each call runs in.
    """
    calls: list[int] = []
    original = attention.varlen_attention

    def kernel(query, key, value, *args, **kwargs):
        return _InOne.apply(counting, lambda *qkv: emulated_varlen(*qkv, *args, **kwargs), query, key, value)

    def call(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs, kernel=kernel)

    monkeypatch.setattr(attention, "varlen_attention", call)
    monkeypatch.setattr(attention, "takes_varlen", lambda query, softcap: softcap is None)
    return calls
