"""What the kinds of training have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from otpo.kernels.held_logits import Logits
from otpo.models.adapters import add_adapters
from otpo.models.loading import load_causal_lm
from otpo.models.policy import PolicyModel
from otpo.models.reward_model import RewardModel
from otpo.records import PromptCompletions, SequenceBatch
from otpo.training.step import CoupledLosses, LossFunction

TrainedModel = PolicyModel | RewardModel


@dataclass(frozen=True)
class Start:
    """The model that training starts from, and what of it is trained.

    Attributes:
        path: folder or hub name.
        four_bit: the precision to compute in with 4-bit weights; None does not quantise.
        lora: settings of the adapters that alone are trained (`otpo.models.adapters.add_adapters`); None trains all
            weights.
        seed: of the adapters.
        pad_id: for a reward model, the token that pads what it scores (`otpo.models.disk.reward_tokenizer`).
        deferred: leave the weights to be read when the model is sharded (`otpo.models.disk.deferred`).
    """

    path: str
    attn_implementation: str = "sdpa"
    four_bit: torch.dtype | None = None
    lora: Mapping[str, Any] | None = None
    seed: int = 0
    pad_id: int | None = None
    deferred: bool = False


def load_policy(start: Start) -> PolicyModel:
    """The language model that training starts from, with its adapters if it has any."""
    lm = load_causal_lm(
        start.path,
        attn_implementation=start.attn_implementation,
        four_bit=start.four_bit,
        deferred=start.deferred,
    )
    return PolicyModel(lm if start.lora is None else add_adapters(lm, start.lora, seed=start.seed))


class CachedLogProbs(Protocol):
    """A frozen model's log-probabilities of the completions of prompts that it was asked about."""

    def logprobs(self, keys: Sequence[int], which: int, mask: Tensor) -> Tensor:
        """(B, T) log-probabilities of completion number `which` of B prompts; 0 where padded and for key -1.

        Args:
            keys: of the `PromptCompletions`.
            mask: (any, T); only its width and device are used.
        """


class Reference(Protocol):
    """The frozen start: a model of its own, or the policy without its adapters."""

    def lazy_logits(self, batch: SequenceBatch) -> Logits:
        """See `PolicyModel.lazy_logits`."""


class FrozenModels(Protocol):
    """The frozen models of a job."""

    def cached(self, items: Sequence[PromptCompletions]) -> dict[str, CachedLogProbs]:
        """Log-probabilities of the items by each of the job's frozen models, such as "reference".

        They are computed where no cache holds them. All ranks must call it, before the first step.
        """

    def live_reference(self) -> Reference:
        """The reference itself, for its whole distribution over the vocabulary, which is too large to cache."""


class Objective(Protocol):
    """One kind of training. Items are all `TokenPair` or all `TokenCompletion`, as the kind needs them."""

    def load(self, start: Start) -> TrainedModel:
        """The model to train, as it starts."""

    def collate(self, items: Sequence[Any]) -> SequenceBatch:
        """Lay out items as a batch of the kind that `losses` takes."""

    def losses(self, model: Any, items: Sequence[Any], frozen: FrozenModels) -> LossFunction | CoupledLosses:
        """The losses of a batch as a function of it. All ranks must call it, before the first step.

        Args:
            model: from `load`, distributed.
            items: all that will be trained and evaluated on.
        """

    def denominator(self, items: Sequence[Any]) -> float:
        """What the summed losses of a global batch of these items are divided by."""
