"""Reward models: a causal LM's decoder with a scalar head, which scores completions.

The score is read from the state of the completion's last token (EOS, or what ends a turn) after the final norm, by a
head without bias: the layout of transformers' `AutoModelForSequenceClassification` with one label, so that an exported
reward model loads there.

Shape legend: S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from otpo.data.collate import collate_completions, padded
from otpo.data.micro_batches import micro_batches
from otpo.data.rows import Text
from otpo.data.template import of_model
from otpo.data.tokens import load_tokenizer, tokenize_outputs
from otpo.errors import UserError, WorkError, first_line
from otpo.models.backbone import Backbone, set_mode
from otpo.models.disk.deferred import ON_META, defer
from otpo.models.disk.loaded import check_loaded, check_precision
from otpo.records import SequenceBatch, TokenCompletion


class RewardModel(nn.Module):
    """A decoder with a scalar head."""

    forward_methods: ClassVar = ("scores", "own_scores")

    def __init__(self, lm: PreTrainedModel):
        super().__init__()
        self.lm = lm
        self.backbone = Backbone(lm)

    def train(self, mode: bool = True) -> RewardModel:
        """Train mode is only for the adapters' dropout; see `set_mode`."""
        super().train(mode)
        set_mode(self.lm, mode)
        return self

    def scores(self, batch: SequenceBatch, head: Tensor | None = None) -> Tensor:
        """(S,) float32 score of each sequence. The head's product is float32: bfloat16 would tie close scores.

        Args:
            head: (D,) in place of the model's own.
        """
        head = self.lm.get_parameter("score.weight")[0] if head is None else head
        return self.backbone.last(self.backbone.decode(batch), batch).float() @ head.float()

    def own_scores(self, batch: SequenceBatch, head: Tensor) -> Tensor:
        """(S,) float32 scores as transformers' classifier gives them: the truth that `scores` is compared with.

        The sequences are padded on the right with the configuration's padding token, as those who serve the model do;
        without one they are scored one by one, as transformers then demands.

        Args:
            head: (D,) in place of the model's own, which is zero in a new reward model.
        """
        ids, attention_mask, _ = padded(batch)
        pad = self.lm.config.get_text_config().pad_token_id
        parts = [slice(index, index + 1) for index in range(len(ids))] if pad is None else [slice(None)]
        hook = self.lm.get_submodule("score").register_forward_hook(
            lambda _, states, __: (states[0].float() @ head.float())[..., None]
        )
        scores = []
        try:
            with self.backbone.padding():
                for part in parts:
                    width = int(attention_mask[part].sum(-1).max())
                    mask = attention_mask[part, :width]
                    of_part = ids[part, :width] if pad is None else ids[part, :width].where(mask.bool(), pad)
                    scores.append(self.lm(input_ids=of_part, attention_mask=mask, use_cache=False).logits[:, 0])
        finally:
            hook.remove()
        return torch.cat(scores)


def load_reward_lm(
    path: str | Path,
    *,
    new_head: bool = False,
    pad_id: int | None = None,
    attn_implementation: str | None = "sdpa",
    deferred: bool = False,
) -> PreTrainedModel:
    """A reward model as transformers' classifier, in the precision it was saved in.

    Args:
        path: a reward model, or with `new_head` also a causal LM.
        new_head: give a model without a head one of zeros, to be trained: it scores every completion 0, so that the
            loss begins at log 2 whatever the seed.
        attn_implementation: transformers' name of the attention; None takes the best that the architecture has.
        pad_id: replaces the padding token of the configuration. transformers reads the score at the last token that is
            not this one, so no completion may end in it (`otpo.models.disk.reward_tokenizer.pad_token`). One beyond the
            vocabulary is added to the embeddings.
        deferred: leave the weights to be read when the model is sharded (`otpo.models.disk.deferred`).

    Raises:
        UserError: there is no such model, transformers has no classifier of its architecture, or it has no scalar head.
    """
    if new_head:
        check_precision(path)
    try:
        lm, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            num_labels=1,
            dtype="auto",
            attn_implementation=attn_implementation,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **(ON_META if deferred else {}),
        )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # torn files, code in pickled weights, no classifier of this architecture: of many types
        reason = first_line(error)
        raise UserError(f"No reward model could be loaded from '{path}': {reason:.400}") from error
    if not isinstance(getattr(lm, "score", None), torch.nn.Linear):
        raise UserError(
            f"expected a decoder with a scalar head (`score.weight`) at '{path}', found {type(lm).__name__}."
        )
    check_loaded(path, info, config=lm.config.get_text_config(), new=["score.weight"])
    missing = set(info["missing_keys"])
    if missing and not new_head:
        raise UserError(
            f"'{path}' is no reward model: expected `score.weight` among its weights. Train one with"
            " `method: reward-model`, or give a folder of AutoModelForSequenceClassification with one label."
        )
    if missing:
        torch.nn.init.zeros_(lm.score.weight)
    if pad_id is not None:
        if pad_id >= lm.get_input_embeddings().weight.shape[0]:
            lm.resize_token_embeddings(pad_id + 1, mean_resizing=False)
        lm.config.pad_token_id = lm.config.get_text_config().pad_token_id = pad_id
    if deferred:
        load = partial(load_reward_lm, path, new_head=new_head, pad_id=pad_id, attn_implementation=attn_implementation)
        defer(lm, path, load, new=missing)
    return lm


class RewardScorer:
    """Scores texts in this process with a reward model: one trained here, or any that transformers loads as a decoder
    with one label.

    Args:
        folder: of the model and its tokenizer.
        template: how prompts are rendered (`otpo.data.template`); "auto" is as the model was trained.
        batch_size: completions at a time.
        device: by default the GPU if there is one.

    Raises:
        UserError: there is no reward model in the folder.
    """

    def __init__(
        self, folder: str | Path, *, template: str = "auto", batch_size: int = 16, device: str | None = None
    ) -> None:
        self.folder, self.batch_size = folder, batch_size
        self.tokenizer = load_tokenizer(folder)
        self.template = of_model(template, folder).for_generation
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = RewardModel(load_reward_lm(folder, attn_implementation=None)).eval().to(self.device)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> list[float]:
        """The score of each completion of its prompt; higher is better. Compare only scores of the same prompt.

        Args:
            prompts: strings, or lists of messages, one for each completion.
            completions: strings; empty ones are scored too.
            progress: called with (done, total).

        Raises:
            UserError: a prompt that cannot be rendered.
            WorkError: a score that is not finite.
        """
        pad = self.model.lm.config.get_text_config().pad_token_id
        items = tokenize_outputs(
            prompts,
            completions,
            self.tokenizer,
            template=self.template.template,
            chat_template_kwargs=self.template.chat_template_kwargs,
        )
        items = [_without_padding(item, pad) for item in items]
        scores = [math.nan] * len(items)
        done = 0
        for indices in micro_batches([item.tokens for item in items], size=self.batch_size, rank=0, world=1):
            batch = collate_completions([items[i] for i in indices]).to(self.device)
            for index, value in zip(indices, self.model.scores(batch).tolist(), strict=True):
                scores[index] = value
            done += len(indices)
            if progress:
                progress(done, len(items))
        bad = [index for index, value in enumerate(scores) if not math.isfinite(value)]
        if bad:
            raise WorkError(
                f"The reward model {self.folder} gave {len(bad)} scores that are not finite, the first to completion"
                f" {bad[0]}."
            )
        return scores


def _without_padding(item: TokenCompletion, pad: int | None) -> TokenCompletion:
    """Without padding tokens at its end, where transformers does not look: a model padded with EOS never reads EOS."""
    ids = item.completion_ids
    while len(ids) > 1 and ids[-1] == pad:
        ids = ids[:-1]
    return replace(item, completion_ids=ids)
