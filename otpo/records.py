"""The records that flow between data, model, weights and losses.

Shape legend: S sequences (for pairs S = 2B: first the B chosen, then the B rejected), B pairs, N tokens of a batch,
T padded length of a completion, D hidden size.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenPair:
    """One preference pair as token ids: the prompt and two completions, each with EOS at its end unless it was cut.

    Attributes:
        row: number of the row in the data file, which identifies the pair.
    """

    row: int
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def tokens(self) -> int:
        """How many tokens it adds to a batch: the prompt's once, and those of both completions."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


@dataclass(frozen=True)
class TokenCompletion:
    """One `{prompt, completion}` row as token ids.

    Attributes:
        row: number of the row in the data file.
        label: whether the completion is desirable; None except in unpaired preference data (KTO).
        mismatched_ids: another prompt's completion, for methods that need one (KTO).
    """

    row: int
    prompt_ids: list[int]
    completion_ids: list[int]
    label: bool | None = None
    mismatched_ids: list[int] | None = None

    @property
    def tokens(self) -> int:
        """How many tokens it adds to a batch: the prompt's once, and those of its completions."""
        return len(self.prompt_ids) + len(self.completion_ids) + len(self.mismatched_ids or [])


@dataclass(frozen=True)
class PromptCompletions:
    """A prompt and completions of it whose log-probabilities under a frozen model are wanted.

    Attributes:
        key: identifies it among all that are cached together; -1 for padding.
    """

    key: int
    prompt_ids: list[int]
    completions: tuple[list[int], ...]

    @property
    def tokens(self) -> int:
        """How many tokens of a batch it takes: the prompt once, and the completions."""
        return len(self.prompt_ids) + sum(map(len, self.completions))


@dataclass(frozen=True)
class VarlenPlan:
    """Attention of all segments of a batch as one call of a variable-length kernel.

    The queries are the segments as they lie in the flat row. The keys of a completion are its prompt's and its own,
    those of a prompt its own; with causal attention aligned at the last key, each token sees what stands before it in
    its sequence.

    Attributes:
        keys: (K,) index into N: the keys of the first segment, then those of the second, ...
        query_starts, key_starts: (segments + 1,) int32, where each segment's queries and keys begin, and their ends.
        longest_query, longest_key: of a segment.
    """

    keys: Tensor
    query_starts: Tensor
    key_starts: Tensor
    longest_query: int
    longest_key: int

    @classmethod
    def of(cls, segments: Sequence[int], sequences: Sequence[tuple[int, int]]) -> VarlenPlan:
        """The plan of a batch with these `segments` and `sequences`, on the CPU."""
        ends = [0, *itertools.accumulate(segments)]
        prompt_of = {completion: prompt for prompt, completion in sequences}
        pieces, sizes = [], []
        for segment, size in enumerate(segments):
            prompt = prompt_of.get(segment)
            if prompt is not None:
                pieces.append(torch.arange(ends[prompt], ends[prompt + 1]))
            pieces.append(torch.arange(ends[segment], ends[segment + 1]))
            sizes.append(size + (0 if prompt is None else segments[prompt]))
        return cls(
            keys=torch.cat(pieces),
            query_starts=torch.tensor(ends, dtype=torch.int32),
            key_starts=torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32),
            longest_query=max(segments),
            longest_key=max(sizes),
        )

    def to(self, device: torch.device | str) -> VarlenPlan:
        """The plan on a device."""
        keys, queries, starts = (on_device(x, device) for x in (self.keys, self.query_starts, self.key_starts))
        return replace(self, keys=keys, query_starts=queries, key_starts=starts)


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device; on the way to a GPU the host does not wait for the copy."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass
class SequenceBatch:
    """S sequences, each a prompt and a completion, as one flat row of N tokens.

    The row consists of segments: a prompt, then the completions that share it, then the next prompt. The prompt is
    stored once. Only the tensors with one row a sequence are padded.

    Everything that the host must know about a batch (lengths, data rows, which places of the padded tensors hold
    tokens) is worked out when the batch is made, so that a step never waits for a GPU to tell it.

    Attributes:
        input_ids: (N,) token ids.
        position_ids: (N,) position of each token in its own sequence.
        segments: length of each segment.
        sequences: for each of the S sequences, the index of its prompt's segment and of its completion's.
        positions: (S, T) index into N of the token that *predicts* each completion token; 0 where padded.
        targets: (S, T) the completion's token ids; 0 where padded.
        mask: (S, T) bool, True on completion tokens (EOS included).
        rows: (S,) the data row of each sequence; -1 for a padding sequence, which keeps a micro-batch from being empty.
        row_numbers: `rows` on the host.
        flat: (n,) index of each completion token into the flattened (S, T), in order.
        ends: (S,) index into N of the last token of each sequence.
        varlen: how attention computes all segments in one call; only made for devices where it does.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: tuple[int, ...]
    sequences: tuple[tuple[int, int], ...]
    positions: Tensor
    targets: Tensor
    mask: Tensor
    rows: Tensor
    row_numbers: tuple[int, ...]
    flat: Tensor
    ends: Tensor
    varlen: VarlenPlan | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, prompt and completion."""
        return [self.segments[prompt] + self.segments[completion] for prompt, completion in self.sequences]

    @property
    def completion_lengths(self) -> list[int]:
        """Tokens of each sequence's completion."""
        return [self.segments[completion] for _, completion in self.sequences]

    def to(self, device: torch.device | str) -> SequenceBatch:
        """The batch on a device."""
        moved: dict[str, Any] = {k: on_device(v, device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        if torch.device(device).type == "cuda":
            moved["varlen"] = VarlenPlan.of(self.segments, self.sequences).to(device)
        return replace(self, **moved)


@dataclass
class LogProbs:
    """Per-token log-probabilities of B completions; `PairLogProbs` holds two of these.

    Attributes:
        policy: (B, T) float32 log-probability of each completion token, with gradient; 0 where padded.
        mask: (B, T) bool.
        rows: (B,) the data row of each completion.
        frozen: frozen models' log-probabilities, each (B, T) float32 without gradient, e.g. "reference".
        vocabulary: sums over the whole vocabulary, each (B, T), as far as the method needs them: "log_sum_squares",
            log sum_v p_v^2 of the policy, without gradient; "reference_kl", KL(reference | policy), with gradient.
        hidden: (B, T, D) the policy's hidden states at the predicting positions, detached, or None where the method
            does not need them. Of the last layer they are taken after the final norm.
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
        """(B, T) log-probabilities of a frozen model.

        Raises:
            KeyError: the record does not hold this model's.
        """
        if name not in self.frozen:
            raise KeyError(
                f"expected log-probabilities of the frozen model '{name}', found those of {sorted(self.frozen)}: "
                "compute the record with this model"
            )
        return self.frozen[name]


@dataclass
class PairLogProbs:
    """B pairs, each side a record of B completions; T may differ between the sides."""

    chosen: LogProbs
    rejected: LogProbs


@dataclass
class TokenWeights:
    """Token weights of B pairs: 0 where padded, without gradient, the same for policy and reference.

    Attributes:
        chosen: (B, Tc). rejected: (B, Tr).
        metrics: what describes the weights (entropy, effective tokens, transport mass), each (B,), for logging.
    """

    chosen: Tensor
    rejected: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class LossOutput:
    """Losses of a batch, unreduced: the step divides their sum by the number of items in the global batch.

    Attributes:
        losses: (B,) float32 with gradient.
        metrics: detached, each (B,), under TRL's names ("rewards/chosen", "rewards/margins", ...).
        not_finite: what a model gave (its name says what) -> (B,) bool, True for the items where it is NaN or infinite
            (`otpo.methods.finite`).
    """

    losses: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    not_finite: dict[str, Tensor] = field(default_factory=dict)
