"""Supervised training on `{prompt, completion}` rows (the base stage)."""

from __future__ import annotations

from collections.abc import Sequence

from otpo.data.collate import collate_completions
from otpo.models.policy import PolicyModel
from otpo.records import LossOutput, SequenceBatch, TokenCompletion
from otpo.training.objectives.base import FrozenModels, Start, load_policy
from otpo.training.step import LossFunction


class SupervisedObjective:
    """The negative log-likelihood of completions, as a mean over their tokens."""

    def load(self, start: Start) -> PolicyModel:
        """See `Objective`."""
        return load_policy(start)

    def collate(self, items: Sequence[TokenCompletion]) -> SequenceBatch:
        """See `Objective`."""
        return collate_completions(items)

    def losses(self, model: PolicyModel, items: Sequence[TokenCompletion], frozen: FrozenModels) -> LossFunction:
        """See `Objective`."""
        return supervised_losses(model)

    def denominator(self, items: Sequence[TokenCompletion]) -> float:
        """Tokens of the completions."""
        return float(sum(len(item.completion_ids) for item in items))


def supervised_losses(model: PolicyModel) -> LossFunction:
    """The negative log-likelihood of each completion, summed over its tokens, as a function of a batch."""

    def losses(batch: SequenceBatch) -> LossOutput:
        logps, _ = model(batch)
        lengths = batch.mask.sum(-1)
        return LossOutput(
            -logps.sum(-1),
            {"lengths/completion": lengths, "logps/token": logps.detach().sum(-1) / lengths.clamp(min=1)},
        )

    return losses
