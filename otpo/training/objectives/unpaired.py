"""Training a policy on labelled completions (KTO)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from otpo.data.unpaired import UnpairedBatch, collate_unpaired, unpaired_prompts
from otpo.methods.finite import not_finite
from otpo.methods.losses import completion_loss
from otpo.methods.losses.unpaired import kto_values
from otpo.methods.spec import MethodSpec
from otpo.models.policy import PolicyModel
from otpo.records import LogProbs, LossOutput, SequenceBatch, TokenCompletion
from otpo.training.objectives.base import CachedLogProbs, FrozenModels, Start, load_policy
from otpo.training.step import Collected, CoupledLosses


@dataclass(frozen=True)
class UnpairedObjective:
    """The loss of a method of labelled completions, as a mean over completions."""

    spec: MethodSpec

    def load(self, start: Start) -> PolicyModel:
        """See `Objective`."""
        return load_policy(start)

    def collate(self, items: Sequence[TokenCompletion]) -> UnpairedBatch:
        """See `Objective`."""
        return collate_unpaired(items)

    def losses(self, model: PolicyModel, items: Sequence[TokenCompletion], frozen: FrozenModels) -> CoupledLosses:
        """See `Objective`."""
        reference = frozen.cached(unpaired_prompts(items))["reference"]
        return unpaired_losses(model, self.spec, lambda batch: cached_unpaired(reference, batch))

    def denominator(self, items: Sequence[TokenCompletion]) -> float:
        """Labelled completions."""
        return float(len(items))


def cached_unpaired(reference: CachedLogProbs, batch: UnpairedBatch) -> tuple[Tensor, Tensor]:
    """The reference's log-probabilities (B, T) of a batch's completions and of its mismatched ones; 0 where padded."""
    keys = batch.keys
    return reference.logprobs(keys, 0, batch.mask), reference.logprobs(keys, 1, batch.mismatched.mask)


def unpaired_losses(
    model: PolicyModel, spec: MethodSpec, reference: Callable[[UnpairedBatch], tuple[Tensor, Tensor]]
) -> CoupledLosses:
    """The loss of a method of labelled completions as a function of an `UnpairedBatch`.

    The KL term depends on the whole global batch: before the loss of the first micro-batch, a forward pass without
    gradient goes over the mismatched completions of all of them.

    Args:
        reference: batch -> the reference's log-probabilities (B, T) of the completions and of the mismatched ones.
    """

    def labels_of(batch: UnpairedBatch) -> Tensor:
        return ~batch.labels if spec.hyperparameters["swap_answers"] else batch.labels

    def logprobs(batch: SequenceBatch, logps: Tensor, reference_logps: Tensor) -> LogProbs:
        return LogProbs(logps, batch.mask, batch.rows, {"reference": reference_logps})

    def collect(batch: SequenceBatch) -> Collected:
        assert isinstance(batch, UnpairedBatch)
        others = batch.mismatched
        found = logprobs(others, model(others)[0], reference(batch)[1])
        return Collected(kto_values(found, labels_of(batch)), not_finite({"mismatched completion": found}))

    def losses(batch: SequenceBatch, global_values: Tensor) -> LossOutput:
        assert isinstance(batch, UnpairedBatch)
        completions, labels = logprobs(batch, model(batch)[0], reference(batch)[0]), labels_of(batch)
        bad = not_finite(
            {
                f"{side} completion": replace(completions, mask=completions.mask & of_side[:, None])
                for side, of_side in (("desirable", batch.labels), ("undesirable", ~batch.labels))
            }
        )
        output = completion_loss(spec, completions, labels, global_values)
        return LossOutput(output.losses, output.metrics, bad)

    return CoupledLosses(collect, losses)
