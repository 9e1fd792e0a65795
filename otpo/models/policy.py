"""The policy: a causal language model that gives the log-probability of each completion token.

Shape legend: S sequences, T padded completion length, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from otpo.data.collate import padded
from otpo.kernels.held_logits import HeldLogits, Logits
from otpo.kernels.logprobs import LazyLogits, VocabularyKernels, chunks
from otpo.models.backbone import Backbone, set_mode
from otpo.models.loading import layer_number
from otpo.records import LogProbs, PairLogProbs, SequenceBatch


class PolicyModel(nn.Module):
    """A causal LM whose forward gives per-token log-probabilities; only completion positions meet the vocabulary.

    The head is applied inside this module's forward because that is where FSDP2 holds its weight whole.

    Attributes:
        own_head: whether the logits are those of the model's own forward. Otherwise the head's weight is multiplied
            here, a chunk at a time, which takes less memory and is right for heads that are one matrix, a factor and a
            soft cap (`otpo.training.start_check` finds out).
    """

    forward_methods: ClassVar = ("lazy_logits", "own_logprobs")  # beside `forward`

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
        self.own_head = False

    def train(self, mode: bool = True) -> PolicyModel:
        """Train mode is only for the adapters' dropout; see `set_mode`."""
        super().train(mode)
        set_mode(self.lm, mode)
        return self

    def use_own_head(self) -> None:
        """Take the logits of the model's own forward from now on, of padded batches."""
        self.backbone.pad()
        self.own_head = True

    def forward(
        self, batch: SequenceBatch, wanted: Collection[str] = (), reference: Logits | None = None, layer: int = -1
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
        hidden, logits = self._states_and_logits(batch, layer if "hidden" in wanted else None)
        values = logits.logprobs(
            batch.targets.flatten()[batch.flat],
            squares="log_sum_squares" in wanted,
            reference=reference if "reference_kl" in wanted else None,
        )
        places = (batch.flat // batch.mask.shape[1], batch.flat % batch.mask.shape[1])
        logps, log_sum_squares, kl = (
            None if flat is None else flat.new_zeros(batch.mask.shape).index_put(places, flat) for flat in values
        )
        assert logps is not None
        extras = {"log_sum_squares": log_sum_squares, "reference_kl": kl}
        if hidden is not None:
            extras["hidden"] = hidden.detach().float() * batch.mask[..., None]
        return logps, {name: value for name, value in extras.items() if value is not None}

    def lazy_logits(self, batch: SequenceBatch) -> Logits:
        """This model's logits for the completions' tokens, for another model's KL to it."""
        return self._states_and_logits(batch)[1]

    def own_logprobs(self, batch: SequenceBatch) -> Tensor:
        """Log-probabilities (S, T) as transformers computes them: the truth that `forward` is compared with.

        Each sequence goes through the model's own forward by itself, without padding, with the attention that the model
        was loaded with; 0 where padded.
        """
        logps = torch.zeros(batch.mask.shape, device=batch.mask.device)
        pieces = batch.input_ids.split(batch.segments)
        with self.backbone.padding():
            for index, (prompt, completion) in enumerate(batch.sequences):
                ids = torch.cat([pieces[prompt], pieces[completion]])[None]
                logits = self.lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
                targets = pieces[completion]
                predicting = HeldLogits(logits[-len(targets) - 1 : -1])
                for rows in chunks(len(targets), logits.shape[-1], logits.device):
                    logps[index, rows] = predicting.log_softmax(rows).gather(-1, targets[rows, None])[:, 0]
        return logps

    def _states_and_logits(self, batch: SequenceBatch, layer: int | None = None) -> tuple[Tensor | None, Logits]:
        """The logits of the completions' tokens and, if a layer is given, its states (S, T, D) that predict them."""
        if self.own_head:
            return self._own_states_and_logits(batch, layer)
        kept: list[Any] = []
        number = layers = self.lm.config.num_hidden_layers if layer is not None else 0
        if layer is not None:
            number = layer_number(layer, layers)
        inner = number < layers  # transformers' last states are those after the norm
        if inner:
            hook = self.lm.get_decoder().layers[number - 1].register_forward_hook(lambda _, __, out: kept.append(out))
        states = self.backbone.decode(batch)
        head = self.lm.get_output_embeddings()
        predicting = self.backbone.of_tokens(states, batch)
        lazy = LazyLogits(predicting, head.weight, head.bias, self.scale, self.softcap, self.kernels)
        if layer is None:
            return None, lazy
        if inner:
            hook.remove()
            states = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
        return self.backbone.predicting(states.detach(), batch), lazy

    def _own_states_and_logits(self, batch: SequenceBatch, layer: int | None) -> tuple[Tensor | None, Logits]:
        ids, attention_mask, _ = padded(batch)
        first = min(batch.segments[prompt] for prompt, _ in batch.sequences) - 1
        options: dict[str, Any] = self.backbone.own_positions(attention_mask)
        if layer is not None:
            options["output_hidden_states"] = True
        if "logits_to_keep" in inspect.signature(self.lm.forward).parameters:
            options["logits_to_keep"] = ids.shape[1] - first  # those of what all prompts share are not needed
        else:
            first = 0
        output = self.lm(input_ids=ids, attention_mask=attention_mask, use_cache=False, **options)
        held = HeldLogits(self.backbone.of_tokens(output.logits, batch, first))
        if layer is None:
            return None, held
        return self.backbone.predicting(output.hidden_states[layer].detach(), batch), held


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
        width = max(batch.completion_lengths[part], default=1)
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
