"""Attention on a CPU over sequences that share their prompts: matrix products over blocks of queries.

torch's own kernel cuts queries and keys into tiles that are too small for bfloat16 products to be fast, most of all in
backward. Here the scores of a block of queries are one product for all heads that read the same keys, and a native
softmax takes one pass over them. Scores are rounded, and probabilities kept for backward, in the model's precision, as
in transformers' eager attention. Blocks are padded to few sizes, because oneDNN compiles each product of a new size,
which takes longer than the product. Blocks of one size are computed together: around short sequences, the overhead of
calls costs more than the products.

Shape legend: H heads, G heads of keys, N tokens of the flat layout, E size of a head, B blocks of one size, W queries
of a block, K its keys, both padded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

BLOCK = 192  # queries; a prompt and its completions that have no more tokens together are one block
GRAIN = 32  # W and K are multiples of it


@dataclass(frozen=True)
class Blocks:
    """Blocks of one size. Queries and keys are rows: N tokens with h heads each are N * h rows.

    Attributes:
        queries: (B * G, H / G * W) rows; padding is row 0.
        keys: (B * G, K) rows; padding is row 0.
        padding: which of the B * H * W queries are padding.
        bias: (B * G or 1, H / G * W, K), 0 where a query sees a key, else -inf. Padded queries see all of K.
    """

    queries: Tensor
    keys: Tensor
    padding: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Plan:
    """How a batch is cut into blocks.

    Attributes:
        blocks: of every size.
        places: (N * H,) of each row, its place among the queries of all blocks; padding tokens have the place behind
            the last.
    """

    blocks: tuple[Blocks, ...]
    places: Tensor


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, plan: Plan, scaling: float) -> Tensor:
    """For every query, the mixture of the values whose keys it sees.

    Args:
        query: (H, N, E).
        key, value: (G, N, E), H a multiple of G.
        plan: from `plan_of`.
        scaling: factor on the scores.

    Returns:
        (N, H, E).
    """
    rows = (x.transpose(0, 1).reshape(-1, x.shape[-1]) for x in (query, key, value))
    return _BlockedAttention.apply(*rows, plan, scaling).view(query.shape[1], len(query), -1)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, plan, scaling):
        outputs, kept = [], []
        for block in plan.blocks:
            keys, values = torch.embedding(key, block.keys), torch.embedding(value, block.keys)
            scores = torch.baddbmm(block.bias, torch.embedding(query, block.queries), keys.mT, alpha=scaling)
            probabilities = scores.softmax(-1)
            outputs.append((probabilities @ values).flatten(0, 1))
            if any(ctx.needs_input_grad):
                kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.plan, ctx.scaling = plan, scaling
        return _in_token_order(outputs, plan)

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *kept = ctx.saved_tensors
        # many blocks read the keys of a prompt: their sum must not lose small terms
        precise = torch.promote_types(key.dtype, torch.float32)
        grad_key, grad_value = torch.zeros_like(key, dtype=precise), torch.zeros_like(value, dtype=precise)
        grad, grad_queries = grad.contiguous(), []
        for block, probabilities in zip(ctx.plan.blocks, kept, strict=True):
            keys, rows = torch.embedding(key, block.keys), block.keys.flatten()
            grad_outputs = torch.embedding(grad, block.queries)
            grad_outputs.flatten(0, 1).index_fill_(0, block.padding, 0)
            grad_value.index_add_(0, rows, (probabilities.mT @ grad_outputs).flatten(0, 1).to(precise))
            grad_probabilities = grad_outputs @ torch.embedding(value, block.keys).mT
            grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, probabilities.dtype)
            grad_queries.append((grad_scores @ keys).flatten(0, 1))
            grad_keys = grad_scores.mT @ torch.embedding(query, block.queries)
            grad_key.index_add_(0, rows, grad_keys.flatten(0, 1).to(precise))
        grad_query, scaling = _in_token_order(grad_queries, ctx.plan), ctx.scaling
        return grad_query.mul_(scaling), grad_key.mul_(scaling).to(key.dtype), grad_value.to(value.dtype), None, None


def _in_token_order(parts: list[Tensor], plan: Plan) -> Tensor:
    """(N * H, E): what the queries of all blocks gave, in the order of the tokens; 0 for padding tokens."""
    return torch.embedding(torch.cat([*parts, parts[0].new_zeros(1, parts[0].shape[-1])]), plan.places)


@lru_cache(maxsize=4)  # every layer of a model asks for the same plan, or for one of two with a sliding window
def plan_of(
    segments: tuple[int, ...],
    sequences: tuple[tuple[int, int], ...],
    *,
    tokens: int,
    window: int | None,
    heads: int,
    groups: int,
    dtype: torch.dtype,
) -> Plan:
    """Cut the causal attention of every sequence of a batch into blocks.

    Args:
        segments, sequences: of the `SequenceBatch`; a prompt's completions lie behind it.
        tokens: N; those behind the last segment are padding.
        window: how many tokens, itself included, a token sees; None is all.
        heads, groups: H, G.
        dtype: of the scores.
    """
    ends = [0, *itertools.accumulate(segments)]
    prompts = list(range(len(segments)))  # of each segment; a prompt is its own
    for prompt, completion in sequences:
        prompts[completion] = prompt
    prompt_of, sizes = torch.tensor(prompts), torch.tensor(segments)
    segment = torch.repeat_interleave(sizes)  # of each token
    begin = torch.where(prompt_of == torch.arange(len(segments)), 0, sizes[prompt_of])
    place = torch.arange(ends[-1]) - torch.tensor(ends)[segment] + begin[segment]  # in its sequence

    def sees(queries: Tensor, keys: Tensor) -> Tensor:
        mine, theirs = segment[queries, None], segment[keys]
        distance = place[queries, None] - place[keys]
        seen = ((mine == theirs) | (prompt_of[mine] == theirs)) & (distance >= 0)
        return seen if window is None else seen & (distance < window)

    by_size: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for queries, keys in _cut(ends, prompts):
        by_size.setdefault((_rounded_up(len(queries)), _rounded_up(len(keys))), []).append((queries, keys))
    blocks, places, offset = [], torch.full((tokens, heads), -1), 0
    for (width, seen), members in by_size.items():
        bias = torch.full((len(members), 1, width, seen), -torch.inf, dtype=dtype)
        for number, (queries, keys) in enumerate(members):
            bias[number, 0, len(queries) :] = 0  # a softmax over nothing would be NaN
            bias[number, 0, : len(queries), : len(keys)].masked_fill_(sees(queries, keys), 0)
        bias = bias.expand(-1, heads // groups, -1, -1).reshape(len(members), -1, seen)
        wanted, padding = _padded([queries for queries, _ in members], width)
        # (B, G, H / G, W): which head of which token, and where its output will be
        head = torch.arange(heads).view(groups, -1, 1)
        rows = wanted[:, None, None] * heads + head
        at = torch.arange(offset, offset + rows.numel()).view(rows.shape)
        real = ~padding[:, None, None].expand(rows.shape)
        places.view(-1)[rows[real]] = at[real]
        offset += rows.numel()
        read, _ = _padded([keys for _, keys in members], seen)
        blocks.append(
            Blocks(
                rows.flatten(2).flatten(0, 1),
                (read[:, None] * groups + torch.arange(groups)[:, None]).flatten(0, 1),
                (~real).flatten().nonzero()[:, 0],
                bias.repeat_interleave(groups, 0) if len(members) > 1 else bias,
            )
        )
    places[places < 0] = offset
    return Plan(tuple(blocks), places.flatten())


def _cut(ends: Sequence[int], prompts: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens of the queries and of the keys of every block.

    Args:
        ends: of the segments, with a 0 before them.
        prompts: for each segment, that of its prompt.
    """
    spans = [torch.arange(start, stop) for start, stop in itertools.pairwise(ends)]
    for prompt, members in itertools.groupby(range(len(spans)), key=lambda index: prompts[index]):
        family = [spans[member] for member in members]
        whole = torch.cat(family)
        if len(whole) <= BLOCK:
            yield whole, whole
            continue
        for span in family:
            shared = [spans[prompt]] if span is not spans[prompt] else []
            for queries in span.split(BLOCK):
                yield queries, torch.cat([*shared, span[: queries[-1] - span[0] + 1]])


def _rounded_up(count: int) -> int:
    return -(-count // GRAIN) * GRAIN


def _padded(tokens: Sequence[Tensor], width: int) -> tuple[Tensor, Tensor]:
    """(B, width) tokens, padded with 0; (B, width) bool, True where padded."""
    lengths = torch.tensor([len(part) for part in tokens])
    padded = torch.stack([nn.functional.pad(part, (0, width - len(part))) for part in tokens])
    return padded, torch.arange(width) >= lengths[:, None]
