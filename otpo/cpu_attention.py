"""Attention on a CPU over sequences that share their prompts: matrix products over blocks of queries.

torch's own kernel cuts queries and keys into tiles that are too small for bfloat16 products to be fast, in backward
most of all. Here the scores of a block of queries are one product for all heads that read the same keys, and a native
softmax takes one pass over them. Scores are rounded, and probabilities kept for backward, in the model's precision, as
in transformers' eager attention. Blocks are filled up to few sizes: oneDNN compiles each product of a shape that is new
to it, which takes longer than the product.

Shape legend: H heads, G heads of keys, N tokens of the flat layout, E size of a head, W queries of a block, K its keys,
both filled up.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 192  # queries. A prompt and its completions that have no more tokens together are one block.
GRAIN = 32  # W and K are multiples of it


@dataclass(frozen=True)
class Block:
    """Queries that lie beside each other, and the keys that any of them sees; zeros behind both fill them up.

    Attributes:
        rows: where the queries lie among the N tokens. keys: the pieces of the N tokens where the keys lie.
        bias: (H / G * W, K), 0 where a query sees a key, else -inf. Queries that fill up see all of K.
    """

    rows: slice
    keys: tuple[slice, ...]
    bias: Tensor

    def queries(self, x: Tensor, groups: int) -> Tensor:
        """(H, N, E) -> (G, H / G * W, E)."""
        heads, _, size = x.shape
        queries = x.new_empty(heads, len(self.bias) * groups // heads, size)
        queries[:, : _length(self.rows)] = x[:, self.rows]
        queries[:, _length(self.rows) :] = 0
        return queries.view(groups, -1, size)

    def answers(self, x: Tensor, heads: int) -> Tensor:
        """(G, H / G * W, E) -> (H, W less what fills up, E)."""
        return x.view(heads, -1, x.shape[-1])[:, : _length(self.rows)]

    def seen(self, x: Tensor) -> Tensor:
        """(G, N, E) -> (G, K, E)."""
        groups, _, size = x.shape
        filling = x.new_zeros(groups, self.bias.shape[1] - sum(map(_length, self.keys)), size)
        return torch.cat([*(x[:, piece] for piece in self.keys), filling], dim=1)

    def add(self, total: Tensor, part: Tensor) -> None:
        """Add (G, K, E) to a sum (G, N, E)."""
        start = 0
        for piece in self.keys:
            total[:, piece] += part[:, start : start + _length(piece)]
            start += _length(piece)


def _length(piece: slice) -> int:
    return piece.stop - piece.start


def _filled(count: int) -> int:
    return -(-count // GRAIN) * GRAIN


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scaling: float) -> Tensor:
    """Every query's mixture of the values whose keys it sees.

    Args:
        query: (H, N, E). key, value: (G, N, E), H a multiple of G.
        blocks: of `blocks_of`. scaling: factor on the scores.

    Returns:
        (N, H, E).
    """
    return _BlockedAttention.apply(query, key, value, blocks, scaling)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, blocks, scaling):
        heads, tokens, size = query.shape
        groups = len(key)
        mixed = query.new_empty(tokens, heads, size)
        kept = []
        for block in blocks:
            scores = torch.baddbmm(block.bias, block.queries(query, groups), block.seen(key).mT, alpha=scaling)
            probabilities = scores.softmax(-1)
            kept.append(probabilities)
            mixed[block.rows] = block.answers(probabilities @ block.seen(value), heads).transpose(0, 1)
            if not any(ctx.needs_input_grad):
                kept.clear()
        ctx.save_for_backward(query, key, value, *kept)
        ctx.blocks, ctx.scaling = blocks, scaling
        return mixed

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *kept = ctx.saved_tensors
        groups = len(key)
        grad = grad.transpose(0, 1)
        grad_query = torch.empty_like(query)
        # a prompt's keys are read by many blocks: small terms must not be lost
        precise = torch.promote_types(key.dtype, torch.float32)
        grad_key, grad_value = torch.zeros_like(key, dtype=precise), torch.zeros_like(value, dtype=precise)
        for block, probabilities in zip(ctx.blocks, kept, strict=True):
            pull = block.queries(grad, groups)
            block.add(grad_value, probabilities.mT @ pull)
            to_probabilities = pull @ block.seen(value).mT
            to_scores = torch._softmax_backward_data(to_probabilities, probabilities, -1, probabilities.dtype)
            grad_query[:, block.rows] = block.answers(to_scores @ block.seen(key), len(query))
            block.add(grad_key, to_scores.mT @ block.queries(query, groups))
        scaling = ctx.scaling
        return grad_query.mul_(scaling), grad_key.mul_(scaling).to(key.dtype), grad_value.to(value.dtype), None, None


@lru_cache(maxsize=4)  # every layer of a model asks for the same, some for a window beside it
def blocks_of(
    segments: tuple[int, ...],
    sequences: tuple[tuple[int, int], ...],
    *,
    window: int | None,
    heads_per_key: int,
    dtype: torch.dtype,
) -> list[Block]:
    """Cut the causal attention of every sequence of a batch into blocks.

    Args:
        segments, sequences: of the `SequenceBatch`; a prompt's completions lie behind it.
        window: how many tokens, itself included, a token sees. heads_per_key: H / G.
    """
    ends = [0, *itertools.accumulate(segments)]
    spans = [slice(start, stop) for start, stop in itertools.pairwise(ends)]
    prompts = list(range(len(segments)))  # of each segment; a prompt is its own
    for prompt, completion in sequences:
        prompts[completion] = prompt
    prompt_of, sizes = torch.tensor(prompts), torch.tensor(segments)
    segment = torch.repeat_interleave(sizes)  # of each token
    begin = torch.where(prompt_of == torch.arange(len(segments)), 0, sizes[prompt_of])
    place = torch.arange(ends[-1]) - torch.tensor(ends)[segment] + begin[segment]  # in its sequence

    def block(rows: slice, *keys: slice) -> Block:
        columns = torch.cat([torch.arange(piece.start, piece.stop) for piece in keys])
        mine, theirs = segment[rows, None], segment[columns]
        distance = place[rows, None] - place[columns]
        sees = ((mine == theirs) | (prompt_of[mine] == theirs)) & (distance >= 0)
        if window is not None:
            sees &= distance < window
        queries, seen = sees.shape
        bias = torch.full((_filled(queries), _filled(seen)), -torch.inf, dtype=dtype)
        bias[queries:] = 0  # a softmax over nothing would be NaN
        bias[:queries, :seen].masked_fill_(sees, 0)
        return Block(rows, keys, bias.repeat(heads_per_key, 1))

    blocks = []
    for prompt, members in itertools.groupby(range(len(segments)), key=lambda index: prompts[index]):
        family = [spans[member] for member in members]
        whole = slice(family[0].start, family[-1].stop)
        if whole.stop - whole.start <= BLOCK:
            blocks.append(block(whole, whole))
            continue
        for span in family:
            shared = [spans[prompt]] if span is not spans[prompt] else []
            for start in range(span.start, span.stop, BLOCK):
                stop = min(start + BLOCK, span.stop)
                blocks.append(block(slice(start, stop), *shared, slice(span.start, stop)))
    return blocks
