"""Logits that a model's own head has computed, held as they are: more memory than `LazyLogits`, and right for any head.

Shape legend: N completion tokens of a batch, n rows of a chunk, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from otpo.kernels.logprobs import Distributions, LazyLogits, chunks


@dataclass(frozen=True)
class HeldLogits:
    """The logits of N positions.

    Attributes:
        logits: (N, V), in the model's precision.
    """

    logits: Tensor

    def log_softmax(self, rows: slice) -> Tensor:
        """(n, V) float32 log-probabilities of some positions."""
        return self.logits[rows].float().log_softmax(-1)

    def logprobs(
        self, targets: Tensor, *, squares: bool = False, reference: Distributions | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See `LazyLogits.logprobs`. The float32 values over the vocabulary are computed again in backward."""

        def of_chunk(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            logps = logits.float().log_softmax(-1)
            at_target = logps.gather(-1, targets[rows, None])[:, 0]
            log_sum_squares = (2 * logps.detach()).logsumexp(-1) if squares else at_target
            kl = at_target
            if reference is not None:
                expected = reference.log_softmax(rows).detach()
                kl = (expected.exp() * (expected - logps)).sum(-1)
            return at_target, log_sum_squares, kl

        parts = [
            checkpoint(of_chunk, self.logits[rows], rows, use_reentrant=False)
            for rows in chunks(len(targets), self.logits.shape[-1], self.logits.device)
        ]
        if not parts:
            parts = [(self.logits.sum(-1).float(),) * 3]  # no token: nothing, with a gradient
        logps, log_sum_squares, kl = (torch.cat(values) for values in zip(*parts, strict=True))
        return logps, log_sum_squares.detach() if squares else None, kl if reference is not None else None


Logits = LazyLogits | HeldLogits
