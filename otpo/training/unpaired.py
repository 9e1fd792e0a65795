"""The loss of methods of labelled completions (KTO), whose KL term depends on the whole global batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from otpo.data.unpaired import UnpairedBatch
from otpo.methods.finite import check_sides
from otpo.methods.losses import completion_loss
from otpo.methods.losses.unpaired import kto_values
from otpo.methods.spec import MethodSpec
from otpo.models.policy import PolicyModel
from otpo.records import LogProbs, LossOutput, SequenceBatch
from otpo.training.step import CoupledLosses


def unpaired_losses(
    model: PolicyModel, spec: MethodSpec, reference: Callable[[UnpairedBatch], tuple[Tensor, Tensor]]
) -> CoupledLosses:
    """The loss of a method of labelled completions as a function of an `UnpairedBatch`.

    The mismatched completions take a forward pass of their own without gradient, over the whole global batch, before
    the loss of the first micro-batch: its KL term depends on all of them.

    Args:
        reference: batch -> the reference's log-probabilities (B, T) of the completions and of the mismatched ones.
    """

    def labels_of(batch: UnpairedBatch) -> Tensor:
        return ~batch.labels if spec.hyperparameters["swap_answers"] else batch.labels

    def record(batch: SequenceBatch, logps: Tensor, reference_logps: Tensor) -> LogProbs:
        return LogProbs(logps, batch.mask, batch.rows, {"reference": reference_logps})

    def collect(batch: SequenceBatch) -> Tensor:
        assert isinstance(batch, UnpairedBatch)
        others = batch.mismatched
        found = record(others, model(others)[0], reference(batch)[1])
        check_sides({"mismatched completion": found})
        return kto_values(found, labels_of(batch))

    def losses(batch: SequenceBatch, global_values: Tensor) -> LossOutput:
        assert isinstance(batch, UnpairedBatch)
        answers, labels = record(batch, model(batch)[0], reference(batch)[0]), labels_of(batch)
        check_sides(
            {
                f"{side} completion": replace(answers, mask=answers.mask & of_side[:, None])
                for side, of_side in (("desirable", batch.labels), ("undesirable", ~batch.labels))
            }
        )
        return completion_loss(spec, answers, labels, global_values)

    return CoupledLosses(collect, losses)
