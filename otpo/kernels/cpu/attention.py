"""Attention on a CPU over sequences that share their prompts: matrix products over blocks of queries.

torch's own kernel cuts queries and keys into tiles that are too small for bfloat16 products to be fast, in backward
most of all. Here the scores of a block of queries are one product for all heads that read the same keys, and a native
softmax takes one pass over them. Scores are rounded, and probabilities kept for backward, in the model's precision, as
in transformers' eager attention. Blocks are filled up to few sizes: oneDNN compiles each product of a shape that is new
to it, which takes longer than the product. Those of one size are computed together: of short sequences a product takes
less time than what is done around it.

Shape legend: H heads, G heads of keys, N tokens of the flat layout, E size of a head, B blocks of one size, W queries
of a block, K its keys, both filled up.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

BLOCK = 192  # queries. A prompt and its completions that have no more tokens together are one block.
GRAIN = 32  # W and K are multiples of it


@dataclass(frozen=True)
class Blocks:
    """Blocks of one size. Queries and keys are rows: of N tokens with h heads each, N * h of them.

    Attributes:
        queries: (B * G, H / G * W) rows. keys: (B * G, K) rows. What fills up is row 0.
        filling: which of the B * H * W queries fill up.
        bias: (B * G or 1, H / G * W, K), 0 where a query sees a key, else -inf. Queries that fill up see all of K.
    """

    queries: Tensor
    keys: Tensor
    filling: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Plan:
    """All blocks of a batch, and where of each of the N * H rows the answer lies among those of all their queries.

    Tokens that only fill up find theirs behind the last.
    """

    blocks: tuple[Blocks, ...]
    answers: Tensor


def blocked_attention(query: Tensor, key: Tensor, value: Tensor, plan: Plan, scaling: float) -> Tensor:
    """Every query's mixture of the values whose keys it sees.

    Args:
        query: (H, N, E). key, value: (G, N, E), H a multiple of G.
        plan: of `plan_of`. scaling: factor on the scores.

    Returns:
        (N, H, E).
    """
    rows = (x.transpose(0, 1).reshape(-1, x.shape[-1]) for x in (query, key, value))
    return _BlockedAttention.apply(*rows, plan, scaling).view(query.shape[1], len(query), -1)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, plan, scaling):
        answers, kept = [], []
        for block in plan.blocks:
            keys, values = torch.embedding(key, block.keys), torch.embedding(value, block.keys)
            scores = torch.baddbmm(block.bias, torch.embedding(query, block.queries), keys.mT, alpha=scaling)
            probabilities = scores.softmax(-1)
            answers.append((probabilities @ values).flatten(0, 1))
            if any(ctx.needs_input_grad):
                kept.append(probabilities)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.plan, ctx.scaling = plan, scaling
        return _gathered(answers, plan)

    @staticmethod
    def backward(ctx, grad):
        query, key, value, *kept = ctx.saved_tensors
        # a prompt's keys are read by many blocks: small terms must not be lost
        precise = torch.promote_types(key.dtype, torch.float32)
        grad_key, grad_value = torch.zeros_like(key, dtype=precise), torch.zeros_like(value, dtype=precise)
        grad, grad_queries = grad.contiguous(), []
        for block, probabilities in zip(ctx.plan.blocks, kept, strict=True):
            keys, rows = torch.embedding(key, block.keys), block.keys.flatten()
            pull = torch.embedding(grad, block.queries)
            pull.flatten(0, 1).index_fill_(0, block.filling, 0)
            grad_value.index_add_(0, rows, (probabilities.mT @ pull).flatten(0, 1).to(precise))
            to_probabilities = pull @ torch.embedding(value, block.keys).mT
            to_scores = torch._softmax_backward_data(to_probabilities, probabilities, -1, probabilities.dtype)
            grad_queries.append((to_scores @ keys).flatten(0, 1))
            to_keys = to_scores.mT @ torch.embedding(query, block.queries)
            grad_key.index_add_(0, rows, to_keys.flatten(0, 1).to(precise))
        grad_query, scaling = _gathered(grad_queries, ctx.plan), ctx.scaling
        return grad_query.mul_(scaling), grad_key.mul_(scaling).to(key.dtype), grad_value.to(value.dtype), None, None


def _gathered(parts: list[Tensor], plan: Plan) -> Tensor:
    """(N * H, E) what the queries of all blocks gave, in the order of the tokens; 0 of what only fills up."""
    return torch.embedding(torch.cat([*parts, parts[0].new_zeros(1, parts[0].shape[-1])]), plan.answers)


@lru_cache(maxsize=4)  # every layer of a model asks for the same, some for a window beside it
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
        tokens: N; those behind the last segment only fill up.
        window: how many tokens, itself included, a token sees. heads, groups: H, G. dtype: of the scores.
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

    sized: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for queries, keys in _cut(ends, prompts):
        sized.setdefault((_filled(len(queries)), _filled(len(keys))), []).append((queries, keys))
    blocks, places, offset = [], torch.full((tokens, heads), -1), 0
    for (width, seen), members in sized.items():
        bias = torch.full((len(members), 1, width, seen), -torch.inf, dtype=dtype)
        for number, (queries, keys) in enumerate(members):
            bias[number, 0, len(queries) :] = 0  # a softmax over nothing would be NaN
            bias[number, 0, : len(queries), : len(keys)].masked_fill_(sees(queries, keys), 0)
        bias = bias.expand(-1, heads // groups, -1, -1).reshape(len(members), -1, seen)
        wanted, filling = _padded([queries for queries, _ in members], width)
        # (B, G, H / G, W): which head of which token, and where its answer will be
        head = torch.arange(heads).view(groups, -1, 1)
        rows = wanted[:, None, None] * heads + head
        at = torch.arange(offset, offset + rows.numel()).view(rows.shape)
        real = ~filling[:, None, None].expand(rows.shape)
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
        ends: of the segments, and 0 before them. prompts: of each segment, its prompt's.
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


def _filled(count: int) -> int:
    return -(-count // GRAIN) * GRAIN


def _padded(tokens: Sequence[Tensor], width: int) -> tuple[Tensor, Tensor]:
    """(B, width) tokens, 0 behind those there are; (B, width) bool, True there."""
    lengths = torch.tensor([len(part) for part in tokens])
    padded = torch.stack([nn.functional.pad(part, (0, width - len(part))) for part in tokens])
    return padded, torch.arange(width) >= lengths[:, None]
