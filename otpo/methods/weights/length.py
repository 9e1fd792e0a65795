"""Token-weight rules that read nothing but the completions' lengths.

Shape legend: B pairs, T padded length of a completion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from otpo.records import LogProbs, PairLogProbs, TokenWeights


def uniform(pair: PairLogProbs, *, seed: int = 0) -> TokenWeights:
    """Weight 1 for every token: the plain sum of log-probabilities (DPO)."""
    dtype = pair.chosen.policy.dtype
    return TokenWeights(pair.chosen.mask.to(dtype), pair.rejected.mask.to(dtype))


def mean(pair: PairLogProbs, *, seed: int = 0) -> TokenWeights:
    """Weight 1 / length: the mean of log-probabilities (SimPO, averaged IPO, length-normalised DPO)."""
    dtype = pair.chosen.policy.dtype
    chosen, rejected = (side.mask / side.lengths.clamp(min=1)[:, None] for side in (pair.chosen, pair.rejected))
    return TokenWeights(chosen.to(dtype), rejected.to(dtype))


def ld(pair: PairLogProbs, *, seed: int = 0, ld_alpha: float) -> TokenWeights:
    """Weight 1 up to the shorter completion's length, `ld_alpha` beyond it.

    LD-DPO, https://arxiv.org/abs/2409.06411. As in TRL today, the reference is weighted like the policy. LLaMA-Factory
    and TRL before 0.25 weight the policy alone, so their DPO loss is not log 2 where the two models are equal.
    """
    shorter = torch.minimum(pair.chosen.lengths, pair.rejected.lengths)[:, None]

    def weights(side: LogProbs) -> Tensor:
        beyond = torch.arange(side.mask.shape[1], device=side.mask.device)[None] >= shorter
        ones = side.mask.to(pair.chosen.policy.dtype)
        return torch.where(beyond, ld_alpha * ones, ones)

    return TokenWeights(weights(pair.chosen), weights(pair.rejected))


def sampo(pair: PairLogProbs, *, seed: int = 0, expected: bool) -> TokenWeights:
    """Weight 1 on as many tokens of each completion as the shorter one has, sampled without replacement; else 0.

    SamPO (EMNLP 2024, https://github.com/LuJunru/SamPO). The official code samples again for the reference; here policy
    and reference share the sample, so DPO's loss is log 2 where they are equal. The sample depends on `seed` and the
    pair's data row alone, not on the batch, the padding or the device.

    Args:
        pair: B pairs.
        seed: of the sample; the caller mixes the epoch in.
        expected: take the expectation of the weights, min(m, n) / length, instead of a sample.
    """
    shorter = torch.minimum(pair.chosen.lengths, pair.rejected.lengths)

    def weights(side: LogProbs, number: int) -> Tensor:
        if expected:
            sampled = side.mask * (shorter / side.lengths.clamp(min=1))[:, None]
        else:
            keys = _random_keys(side, seed=seed, side=number).masked_fill(~side.mask, -1)
            rank = keys.argsort(dim=-1, descending=True).argsort(dim=-1)
            sampled = (rank < shorter[:, None]) & side.mask
        return sampled.to(pair.chosen.policy.dtype)

    return TokenWeights(weights(pair.chosen, 0), weights(pair.rejected, 1))


def _random_keys(completions: LogProbs, *, seed: int, side: int) -> Tensor:
    """(B, T) distinct non-negative int64 keys of each row, hashed from (seed, side, data row, position)."""
    positions = torch.arange(completions.mask.shape[1], device=completions.mask.device)
    keys = torch.full_like(completions.rows, seed)
    for value in (torch.full_like(keys, side), completions.rows):
        keys = _mix(keys ^ _mix(value))
    return (_mix(keys[:, None] ^ _mix(positions)[None, :]) << 24) | positions


def _mix(values: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser on int64 tensors (products may wrap: only the low 32 bits are kept)."""
    low = 0xFFFFFFFF
    values = (values + 0x9E3779B9) & low
    values = ((values ^ (values >> 16)) * 0x85EBCA6B) & low
    values = ((values ^ (values >> 13)) * 0xC2B2AE35) & low
    return values ^ (values >> 16)
