"""Log-probabilities of tokens without ever holding the logits of all of them.

Shape legend: N completion tokens of a batch, n rows of a chunk or tile, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from otpo.kernels.cpu import uses_cpu_kernels
from otpo.kernels.cpu.buckets import bucket_size

CHUNK_LOGITS = {"cpu": 2**26, "cuda": 2**29}
"""Logits of one matrix product, in the model's precision: 128 MiB and 1 GiB in bfloat16. Each chunk adds a gradient as
large as the head to the sum of the others, which takes a GPU longer than a small product itself."""

KEPT_CHUNKS = 4  # the last chunks, whose logits are kept for backward; those of earlier ones are computed again
TILE_LOGITS = 2**21  # float32 logits at a time on a CPU: 8 MiB stay in its cache through all that is done to them


class _FusedLogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target] in chunks of rows; backward computes again the logits that were not kept.

    The same pass gives log sum_v p_v^2 (without gradient) and, with a reference, KL(p_reference | p) of each row.
    """

    @staticmethod
    def forward(ctx, lazy, hidden, weight, bias, targets, squares, reference):
        logps = hidden.new_empty(len(targets), dtype=torch.float32)
        normalizers = torch.empty_like(logps)
        log_sum_squares = torch.empty_like(logps) if squares else None
        kl = torch.empty_like(logps) if reference is not None else None
        kept: deque[Tensor] = deque(maxlen=KEPT_CHUNKS if any(ctx.needs_input_grad) else 1)
        for chunk in chunks(len(targets), len(weight), hidden.device):
            products = lazy.products(chunk)
            kept.append(products)
            for rows, tile in _tiles(chunk, products):
                expected = None if reference is None else reference.log_softmax(rows)
                found = lazy.kernels.logprobs(
                    products[tile], targets[rows], expected, squares, lazy.scale, lazy.softcap
                )
                for kind, values in zip((logps, normalizers, log_sum_squares, kl), found, strict=True):
                    if kind is not None:
                        kind[rows] = values
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers)
        ctx.lazy, ctx.reference = lazy, reference
        ctx.kept = kept
        ctx.set_materialize_grads(False)
        if log_sum_squares is not None:
            ctx.mark_non_differentiable(log_sum_squares)
        return logps, log_sum_squares, kl

    @staticmethod
    def backward(ctx, grad, _, grad_kl):
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        lazy = ctx.lazy
        _, need_hidden, need_weight, need_bias = ctx.needs_input_grad[:4]
        grad = normalizers.new_zeros(len(targets)) if grad is None else grad
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = _Sum() if need_weight else None
        grad_bias = _Sum() if need_bias and bias is not None else None
        for chunk in reversed(list(chunks(len(targets), len(weight), hidden.device))):
            products = ctx.kept.pop() if ctx.kept else lazy.products(chunk)
            count = chunk.stop - chunk.start
            for rows, tile in _tiles(chunk, products):
                to_kl, expected = (None, None) if grad_kl is None else (grad_kl[rows], ctx.reference.log_softmax(rows))
                lazy.kernels.gradient_(
                    products[tile], targets[rows], normalizers[rows], grad[rows], to_kl, expected,
                    lazy.scale, lazy.softcap,
                )  # fmt: skip
            products[count:] = 0  # padding
            if grad_hidden is not None:
                grad_hidden[chunk] = (products @ weight)[:count]
            if grad_weight is not None:
                grad_weight.add(products.T @ _padded_to_bucket(hidden[chunk], weight))
            if grad_bias is not None:
                grad_bias.add(products.sum(0))
        return (
            None,
            grad_hidden,
            None if grad_weight is None else grad_weight.total(weight),
            None if grad_bias is None else grad_bias.total(bias),
            *[None] * 3,
        )


class _Sum:
    """A sum of products; in float32 once there are two, so that small terms are not lost in bfloat16."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def add(self, part: Tensor) -> None:
        self.value = part if self.value is None else self.value.float().add_(part)

    def total(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like) if self.value is None else self.value.to(like.dtype)


def chunks(n: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """0 to n in slices whose logits are computed by one matrix product."""
    return slices(n, CHUNK_LOGITS["cuda" if device.type == "cuda" else "cpu"] // vocabulary)


def slices(n: int, rows: int) -> Iterator[slice]:
    """0 to n in slices of so many rows, at least one."""
    rows = max(1, rows)
    return (slice(start, min(n, start + rows)) for start in range(0, n, rows))


def _padded_to_bucket(states: Tensor, weight: Tensor) -> Tensor:
    """(n', D) states, padded with 0 (`otpo.kernels.cpu.buckets`)."""
    return nn.functional.pad(states, (0, 0, 0, bucket_size(len(states), weight) - len(states)))


def _tiles(chunk: slice, products: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows of the batch, and their rows in the chunk. A GPU takes the chunk whole."""
    count = chunk.stop - chunk.start
    rows = TILE_LOGITS // products.shape[1] if uses_cpu_kernels(products) else count
    for tile in slices(count, rows):
        yield slice(chunk.start + tile.start, chunk.start + tile.stop), tile


def _logits(products: Tensor, scale: float, softcap: float | None) -> Tensor:
    """(n, V) float32 logits, in memory of their own."""
    logits = products.to(torch.float32, copy=True)
    if scale != 1:
        logits *= scale
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


def tile_logprobs(
    products: Tensor, targets: Tensor, expected: Tensor | None, squares: bool, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Log-probabilities of one tile's targets, and what else is computed from its logits.

    Args:
        products: (n, V) hidden states times the head, in the model's precision.
        targets: (n,).
        expected: (n, V) a reference's log-probabilities.
        squares: whether log sum_v p_v^2 is wanted.
        scale, softcap: of the `LazyLogits`.

    Returns:
        For each row, (n,) float32: log-probability; log of the sum of all exponentials; log sum_v p_v^2 or None;
        KL(expected | p) or None.
    """
    logits = _logits(products, scale, softcap)
    at_target = logits.gather(-1, targets[:, None])[:, 0]
    kl = None
    if expected is not None:
        kl = (expected.exp() * (expected - logits + logits.logsumexp(-1, keepdim=True))).sum(-1)
    largest = logits.amax(-1)
    exponentials = logits.sub_(largest[:, None]).exp_()
    total = exponentials.sum(-1)
    normalizers = total.log() + largest
    log_sum_squares = exponentials.square_().sum(-1).log() - 2 * total.log() if squares else None
    return at_target - normalizers, normalizers, log_sum_squares, kl


def tile_gradient_(
    products: Tensor,
    targets: Tensor,
    normalizers: Tensor,
    grad: Tensor,
    grad_kl: Tensor | None,
    expected: Tensor | None,
    scale: float,
    softcap: float | None,
) -> None:
    """Overwrite one tile's products with their gradient.

    Args:
        products, targets, expected, scale, softcap: as for `tile_logprobs`.
        normalizers: (n,) from `tile_logprobs`.
        grad: (n,) gradient of the log-probabilities.
        grad_kl: (n,) gradient of KL(expected | p), or None.
    """
    pull = -grad if grad_kl is None else grad_kl - grad

    def gradient(products: Tensor, expected: Tensor | None, of_target: Tensor | None) -> Tensor:
        logits = _logits(products, scale, softcap)
        slope = 1 - (logits / softcap) ** 2 if softcap else None
        delta = logits.sub_(normalizers[:, None]).exp_().mul_(pull[:, None])
        if grad_kl is not None and expected is not None:
            delta -= grad_kl[:, None] * expected.exp()
        if of_target is not None:
            delta += of_target[:, None]
        if slope is not None:
            delta *= slope
        if scale != 1:
            delta *= scale
        return delta

    target = targets[:, None]
    at_target = gradient(products.gather(-1, target), None if expected is None else expected.gather(-1, target), grad)
    products.copy_(gradient(products, expected, None))
    # `scatter_` takes a hundred times as long on a CPU
    products[torch.arange(len(targets), device=targets.device), targets] = at_target[:, 0].to(products.dtype)


@dataclass(frozen=True)
class VocabularyKernels:
    """The two element-wise functions over the vocabulary, as they are or compiled (`otpo.models.compiled`)."""

    logprobs: Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = tile_logprobs
    gradient_: Callable[..., None] = tile_gradient_


class Distributions(Protocol):
    """Another model's distributions over the vocabulary at the positions of a batch."""

    def log_softmax(self, rows: slice) -> Tensor:
        """(n, V) float32 log-probabilities of some positions."""


@dataclass(frozen=True)
class LazyLogits:
    """The logits of N positions, as hidden states and a head that are multiplied only a chunk at a time.

    Attributes:
        states: (N, D) after the final norm.
        weight: (V, D) of the head.
        bias: (V,) of the head, or None.
        scale: factor on the logits (Granite, Cohere).
        softcap: final logit soft-cap (Gemma 2).
    """

    states: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    kernels: VocabularyKernels = VocabularyKernels()

    def products(self, rows: slice) -> Tensor:
        """(n', V) states times the head for some positions, in the model's precision; rows beyond n are padding."""
        return nn.functional.linear(_padded_to_bucket(self.states[rows], self.weight), self.weight, self.bias)

    def log_softmax(self, rows: slice) -> Tensor:
        """(n, V) float32 log-probabilities of some positions."""
        return _logits(self.products(rows)[: rows.stop - rows.start], self.scale, self.softcap).log_softmax(-1)

    def logprobs(
        self, targets: Tensor, *, squares: bool = False, reference: Distributions | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities of targets and, from the same pass, other figures of the distribution.

        Args:
            targets: (N,) token ids.
            squares: whether to give log sum_v p_v^2.
            reference: another model's logits at the same positions, without gradient; backward computes them again.

        Returns:
            (N,) float32 log-probabilities, equal to `log_softmax(logits.float(), -1).gather(targets)`; (N,)
            log sum_v p_v^2 without gradient, or None; (N,) KL(reference | self), or None.
        """
        return _FusedLogProbs.apply(self, self.states, self.weight, self.bias, targets, squares, reference)
