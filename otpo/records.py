"""The records that flow between data, model, weights and losses.

Shape legend: S sequences (for pairs S = 2B: first the B chosen, then the B rejected), B pairs, N tokens of a batch,
T padded length of a completion, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenPair:
    """One preference pair as token ids: the prompt once, both answers after it (each ends in EOS if it was given one).

    Attributes:
        row: number of the row in the data file, the stable id of the pair.
    """

    row: int
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def tokens(self) -> int:
        """What a batch holds of it: the prompt and both answers."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


@dataclass(frozen=True)
class TokenCompletion:
    """One `{prompt, completion}` row as token ids.

    Attributes:
        label: whether the completion is desirable; only of unpaired preference data (KTO).
        mismatched_ids: a completion that belongs to another prompt, for methods that compare with it.
    """

    row: int
    prompt_ids: list[int]
    completion_ids: list[int]
    label: bool | None = None
    mismatched_ids: list[int] | None = None

    @property
    def tokens(self) -> int:
        """What a batch holds of it: the prompt and its completions."""
        return len(self.prompt_ids) + len(self.completion_ids) + len(self.mismatched_ids or [])


@dataclass
class SequenceBatch:
    """Sequences of a prompt and a completion, laid out flat.

    A prompt stands once, and behind it the completions that share it. Nothing is padded but what has a row a sequence.
    N tokens lie in segments, one after the other.

    Attributes:
        input_ids: (N,) token ids.
        position_ids: (N,) the place of each token in its own sequence.
        segments: length of each segment.
        sequences: of each of the S sequences, the segment of its prompt and that of its completion.
        positions: (S, T) index into N of the token that *predicts* each completion token; 0 where padded.
        targets: (S, T) the completion's token ids; 0 where padded.
        mask: (S, T) bool, True on completion tokens (EOS included).
        rows: (S,) the data row of each sequence, or -1 for a sequence that only fills an empty micro-batch.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: tuple[int, ...]
    sequences: tuple[tuple[int, int], ...]
    positions: Tensor
    targets: Tensor
    mask: Tensor
    rows: Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, its prompt included."""
        return [self.segments[prompt] + self.segments[completion] for prompt, completion in self.sequences]

    def to(self, device: torch.device | str) -> SequenceBatch:
        """The batch on a device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass
class LogProbs:
    """Per-token log-probabilities of B completions. Pairs are two of these.

    Attributes:
        policy: (B, T) float32 log-probability of each completion token, with gradient; 0 where padded.
        mask: (B, T) bool.
        rows: (B,) the data row of each completion.
        frozen: frozen models' log-probabilities, each (B, T) float32 without gradient, e.g. "reference".
        vocabulary: figures over the policy's whole vocabulary, each (B, T): "log_sum_squares", log sum_v p_v^2, without
            gradient; "reference_kl", KL(reference | policy), with gradient. Those that the method asked for.
        hidden: (B, T, D) policy hidden states after the final norm at the predicting positions, detached, or None
            when the method did not ask for them.
    """

    policy: Tensor
    mask: Tensor
    rows: Tensor
    frozen: dict[str, Tensor] = field(default_factory=dict)
    vocabulary: dict[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """(B,) completion lengths in tokens."""
        return self.mask.sum(-1)

    def frozen_logps(self, name: str) -> Tensor:
        """(B, T) log-probabilities of a frozen model."""
        if name not in self.frozen:
            raise KeyError(
                f"log-probabilities of the frozen model '{name}' are needed here; present: {sorted(self.frozen)}"
            )
        return self.frozen[name]


@dataclass
class PairLogProbs:
    """The two sides of B pairs; T may differ between the sides."""

    chosen: LogProbs
    rejected: LogProbs


@dataclass
class TokenWeights:
    """Token weights of B pairs, zero where padded, without gradient. Policy and reference are always weighted alike.

    Attributes:
        chosen: (B, Tc). rejected: (B, Tr).
        metrics: per-pair (B,) figures about the weights (entropy, effective tokens, transport mass), for logging.
    """

    chosen: Tensor
    rejected: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class LossOutput:
    """Losses of a batch before any reduction: the step divides their sum by the global number of pairs.

    Attributes:
        losses: (B,) float32 with gradient.
        metrics: per-pair (B,) detached tensors under TRL's names ("rewards/chosen", "rewards/margins", ...).
    """

    losses: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
