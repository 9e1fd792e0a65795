"""The part that policies and reward models share: token ids of a batch in, hidden states of its sequences out.

Shape legend: S sequences, T padded completion length, N tokens of the flat layout, L padded length of a sequence,
D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from otpo.data.collate import padded, padded_positions
from otpo.kernels.cpu.buckets import bucket_size
from otpo.models.attention import share_prompts
from otpo.models.rope import rotate_by_own_length
from otpo.records import SequenceBatch, on_device


class Backbone:
    """A language model's decoder over a `SequenceBatch`.

    It is no module: the model that uses it holds `lm` itself, so that the names of weights in checkpoints begin with
    `lm.` whichever model that is. It must be called inside a forward pass of that model, where FSDP2 and
    `otpo.kernels.mixed_precision` hold the weights ready.

    Attributes:
        attn_implementation: transformers' name of the attention of padded batches: the one that the model was loaded
            with, but eager where that would leave out a soft cap.
        shares_prompts: whether the model takes flat batches, in which a prompt is computed once for all its
            completions. Otherwise sequences are padded.
        same_rope: the longest sequence whose rotary frequencies are those of shorter ones; None where they do not
            depend on length. From the first batch with a longer one on, sequences are padded: a prompt's frequencies
            would be those of one of its completions.
    """

    def __init__(self, lm: PreTrainedModel):
        self.lm = lm.eval()  # see `set_mode`
        self.attn_implementation: str = lm.config._attn_implementation
        capped = getattr(lm.config.get_text_config(), "attn_logit_softcapping", None)
        self.shares_prompts = share_prompts(lm)
        self.same_rope = rotate_by_own_length(lm)
        if capped and self.attn_implementation == "sdpa":  # transformers' sdpa drops the cap without a word
            self.attn_implementation = "eager"
            if not self.shares_prompts:
                lm.set_attn_implementation("eager")

    def pad(self) -> None:
        """Take padded batches from now on, with the attention that the model was loaded with."""
        if self.shares_prompts:
            self.shares_prompts = False
            self.lm.set_attn_implementation(self.attn_implementation)

    @contextmanager
    def padding(self) -> Iterator[None]:
        """Take padded batches while the body runs; see `pad`."""
        flat, now = self.shares_prompts, self.lm.config._attn_implementation
        self.pad()
        try:
            yield
        finally:
            if flat:
                self.shares_prompts = True
                self.lm.set_attn_implementation(now)

    def decode(self, batch: SequenceBatch) -> Tensor:
        """States after the final norm in the decoder's layout: (1, N, D) flat, or (S, L, D) padded.

        N or L is padded to a bucket size (`otpo.kernels.cpu.buckets`).
        """
        about: dict[str, Tensor]
        if self.same_rope is not None and max(batch.lengths, default=0) > self.same_rope:
            self.pad()
        if self.shares_prompts:
            ids, about = batch.input_ids[None], {"position_ids": batch.position_ids[None]}
        else:
            ids, attention_mask, _ = padded(batch)
            about = {"attention_mask": attention_mask}
        embeddings: Any = self.lm.get_input_embeddings()
        padding = bucket_size(ids.shape[1], embeddings.weight) - ids.shape[1]
        layout: dict[str, Any] = {name: nn.functional.pad(values, (0, padding)) for name, values in about.items()}
        # pads with a token of the batch: another one's embedding may not be finite
        layout["input_ids"] = torch.cat([ids, ids[:, :1].expand(-1, padding)], dim=1)
        if self.shares_prompts:
            layout["batch"] = batch
        else:
            layout |= self.own_positions(layout["attention_mask"])
        return self.lm.get_decoder()(use_cache=False, **layout).last_hidden_state

    def own_positions(self, attention_mask: Tensor) -> dict[str, Tensor]:
        """What a padded batch is given beside its mask (S, L), where rotary frequencies depend on length."""
        return {} if self.same_rope is None else {"position_ids": attention_mask.cumsum(-1) - 1}

    def predicting(self, states: Tensor, batch: SequenceBatch) -> Tensor:
        """(S, T, D) of the states that predict the completions' tokens.

        Args:
            states: in the decoder's layout, of any of its layers.
        """
        if self.shares_prompts:
            return states[0][batch.positions]
        sequences = torch.arange(len(states), device=states.device)
        return states[sequences[:, None], padded_positions(batch)]

    def of_tokens(self, states: Tensor, batch: SequenceBatch, first: int = 0) -> Tensor:
        """(n, D) of the states that predict the completions' tokens, in the order of `SequenceBatch.flat`.

        Args:
            first: the place, in its padded sequence, of the first state that there is.
        """
        if self.shares_prompts:
            return states.squeeze(0).index_select(0, batch.positions.flatten()[batch.flat])
        starts = torch.arange(len(states), device=states.device) * states.shape[1] - first
        places = (padded_positions(batch) + starts[:, None]).flatten()[batch.flat]
        return states.flatten(0, 1).index_select(0, places)

    def last(self, states: Tensor, batch: SequenceBatch) -> Tensor:
        """(S, D) of the states of the sequences' last tokens; see `predicting`."""
        if self.shares_prompts:
            return states[0][batch.ends]
        sequences = torch.arange(len(states), device=states.device)
        return states[sequences, on_device(torch.tensor(batch.lengths), states.device) - 1]


def set_mode(lm: PreTrainedModel, training: bool) -> None:
    """Put a language model into eval mode, and the adapters' own dropout, which a recipe asks for, into `training`.

    A model in train mode drops activations out and jitters its router (`nn.functional.dropout` with a probability of
    the layer's own, `router_jitter_noise`): the policy would not begin at the reference, and would not train on what it
    computes when it is used.
    """
    lm.eval()
    for module in lm.modules():
        dropouts = getattr(module, "lora_dropout", None)
        if isinstance(dropouts, nn.ModuleDict):
            dropouts.train(training)
