"""The policy: a causal language model that gives the log-probability of each completion token.

Shape legend: S sequences, T padded completion length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from otpo.kernels.logprobs import LazyLogits, VocabularyKernels
from otpo.models.backbone import Backbone
from otpo.models.loading import layer_number
from otpo.records import LogProbs, PairLogProbs, SequenceBatch


class PolicyModel(nn.Module):
    """A causal LM whose forward gives per-token log-probabilities; only completion positions meet the vocabulary.

    The head is applied inside this module's forward because that is where FSDP2 holds its weight whole.
    """

    forward_methods: ClassVar = ("lazy_logits",)  # beside `forward`

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm = lm
        self.backbone = Backbone(lm)
        config = lm.config
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = float(getattr(config, "logit_scale", 1.0) or 1.0) / float(
            getattr(config, "logits_scaling", 1.0) or 1.0
        )
        self.kernels = VocabularyKernels()

    def forward(
        self, batch: SequenceBatch, wanted: Collection[str] = (), reference: LazyLogits | None = None, layer: int = -1
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probabilities of the completions and, for each token, the extras that are wanted; 0 where padded.

        Args:
            wanted: "hidden": states at the predicting positions, detached; "log_sum_squares": log sum_v p_v^2;
                "reference_kl": KL(reference | self).
            reference: the reference's logits for this batch, for "reference_kl".
            layer: whose states "hidden" are, as an index into transformers' `hidden_states`; -1 are those after the
                final norm. No other layer's are kept.

        Returns:
            logps (S, T) float32; the extras by name: "hidden" (S, T, D) float32, the others (S, T).
        """
        hidden, lazy = self._states_and_logits(batch, layer if "hidden" in wanted else -1)
        values = lazy.logprobs(
            batch.targets[batch.mask],
            squares="log_sum_squares" in wanted,
            reference=reference if "reference_kl" in wanted else None,
        )
        logps, log_sum_squares, kl = (
            None if flat is None else flat.new_zeros(batch.mask.shape).masked_scatter(batch.mask, flat)
            for flat in values
        )
        assert logps is not None
        extras = {"log_sum_squares": log_sum_squares, "reference_kl": kl}
        if "hidden" in wanted:
            extras["hidden"] = hidden.detach().float() * batch.mask[..., None]
        return logps, {name: value for name, value in extras.items() if value is not None}

    def lazy_logits(self, batch: SequenceBatch) -> LazyLogits:
        """This model's logits for the completions' tokens, for another model's KL to it."""
        return self._states_and_logits(batch)[1]

    def _states_and_logits(self, batch: SequenceBatch, layer: int = -1) -> tuple[Tensor, LazyLogits]:
        """A layer's states (S, T, D) at the predicting positions, and the logits that the last layer's give."""
        layers, kept = self.lm.config.num_hidden_layers, []
        number = layer_number(layer, layers)
        inner = number < layers  # transformers' last states are those after the norm
        if inner:
            hook = self.lm.get_decoder().layers[number - 1].register_forward_hook(lambda _, __, out: kept.append(out))
        predicting = self.backbone.predicting(self.backbone.decode(batch), batch)
        head = self.lm.get_output_embeddings()
        lazy = LazyLogits(predicting[batch.mask], head.weight, head.bias, self.scale, self.softcap, self.kernels)
        if not inner:
            return predicting, lazy
        hook.remove()
        states = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
        return self.backbone.predicting(states.detach(), batch), lazy


def pair_logprobs(
    logps: Tensor, extras: Mapping[str, Tensor], batch: SequenceBatch, frozen: Mapping[str, Tensor]
) -> PairLogProbs:
    """Cut a batch of 2B sequences (chosen first) into the two sides.

    Args:
        logps: (2B, T) from `PolicyModel`.
        extras: the other values it gave.
        frozen: name of a frozen model -> its (2B, T) log-probabilities.
    """
    half = len(logps) // 2

    def side(part: slice) -> LogProbs:
        width = max(1, int(batch.mask[part].sum(-1).max())) if half else 1
        cut = (part, slice(0, width))
        return LogProbs(
            policy=logps[cut],
            mask=batch.mask[cut],
            rows=batch.rows[part],
            frozen={name: values[cut] for name, values in frozen.items()},
            vocabulary={name: values[cut] for name, values in extras.items() if name != "hidden"},
            hidden=extras["hidden"][cut] if "hidden" in extras else None,
        )

    return PairLogProbs(chosen=side(slice(0, half)), rejected=side(slice(half, None)))
