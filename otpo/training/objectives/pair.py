"""Training a policy on preference pairs: DPO, OTPO and every other method that compares two completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from otpo.data.collate import collate_pairs
from otpo.data.token_file import Prompts, column
from otpo.methods.finite import not_finite, pair_sides
from otpo.methods.losses import pair_loss
from otpo.methods.spec import MethodSpec
from otpo.methods.weights import shared_prefix_gradient, token_weights
from otpo.models.policy import PolicyModel, pair_logprobs
from otpo.records import LossOutput, PairLogProbs, PromptCompletions, SequenceBatch, TokenPair, TokenWeights
from otpo.training.objectives.base import CachedLogProbs, FrozenModels, Reference, Start, load_policy
from otpo.training.step import Collected, CoupledLosses, LossFunction


@dataclass(frozen=True)
class PairObjective:
    """The loss of a pair method, as a mean over pairs.

    Attributes:
        seed: for weight rules that sample tokens.
    """

    spec: MethodSpec
    seed: int

    def load(self, start: Start) -> PolicyModel:
        """See `Objective`."""
        return load_policy(start)

    def collate(self, items: Sequence[TokenPair]) -> SequenceBatch:
        """See `Objective`."""
        return collate_pairs(items)

    def losses(
        self, model: PolicyModel, items: Sequence[TokenPair], frozen: FrozenModels
    ) -> LossFunction | CoupledLosses:
        """See `Objective`."""
        cached = frozen.cached(pair_prompts(items))
        reference = frozen.live_reference() if "reference_kl" in self.spec.method.needs else None
        return preference_losses(
            model, self.spec, lambda batch: cached_pairs(cached, batch), seed=self.seed, reference=reference
        )

    def denominator(self, items: Sequence[TokenPair]) -> float:
        """Pairs."""
        return float(len(items))


def pair_prompts(pairs: Sequence[TokenPair]) -> Prompts:
    """What frozen models are asked about pairs: both completions, with the data row as key."""

    def prompt(pair: TokenPair) -> PromptCompletions:
        return PromptCompletions(pair.row, pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids))

    return Prompts(pairs, prompt, column(pairs, "row"))


def cached_pairs(cached: Mapping[str, CachedLogProbs], batch: SequenceBatch) -> dict[str, Tensor]:
    """Frozen models' log-probabilities of a batch of pairs: name -> (2B, T), 0 where padded."""
    rows = batch.row_numbers[: len(batch.row_numbers) // 2]
    return {
        name: torch.cat([model.logprobs(rows, side, batch.mask) for side in (0, 1)]) for name, model in cached.items()
    }


def preference_losses(
    model: PolicyModel,
    spec: MethodSpec,
    frozen: Callable[[SequenceBatch], dict[str, Tensor]],
    *,
    seed: int,
    reference: Reference | None = None,
) -> LossFunction | CoupledLosses:
    """The loss of a pair method as a function of a batch.

    Args:
        frozen: batch -> name of a frozen model -> its (2B, T) log-probabilities.
        seed: for weight rules that sample tokens; the same for policy and reference.
        reference: the frozen start itself, for methods that need its whole distribution ("reference_kl").
    """

    def logprobs_and_weights(batch: SequenceBatch) -> tuple[PairLogProbs, TokenWeights, dict[str, Tensor]]:
        expected = None
        if "reference_kl" in spec.method.needs:
            assert reference is not None, f"{spec.method.name} needs the reference model beside the policy"
            with torch.no_grad():
                expected = reference.lazy_logits(batch)
        logps, extras = model(batch, spec.method.needs, expected, spec.layer)
        pairs = pair_logprobs(logps, extras, batch, frozen(batch))
        bad = not_finite(pair_sides(pairs))
        if spec.hyperparameters["swap_answers"]:
            pairs = PairLogProbs(pairs.rejected, pairs.chosen)
        with torch.no_grad():
            weights = token_weights(spec, pairs, seed=seed)
        return pairs, weights, bad

    def losses(batch: SequenceBatch, global_values: Tensor | None = None) -> LossOutput:
        pairs, weights, bad = logprobs_and_weights(batch)
        output = pair_loss(spec, pairs, weights, global_values)
        metrics = {
            "lengths/chosen": pairs.chosen.lengths,
            "lengths/rejected": pairs.rejected.lengths,
            "weights/shared_prefix_gradient": shared_prefix_gradient(weights, batch),
        }
        return LossOutput(output.losses, output.metrics | metrics, bad)

    values_of = spec.method.loss.collect
    if values_of is None:
        return losses

    def collect(batch: SequenceBatch) -> Collected:
        pairs, weights, bad = logprobs_and_weights(batch)
        return Collected(values_of(pairs, weights), bad)

    return CoupledLosses(collect, losses)
