"""Reward models: a causal LM's decoder with a scalar head, which scores answers.

The score is read from the state of the answer's last token (EOS, or what ends a turn) after the final norm, by a head
without bias: the layout of transformers' `AutoModelForSequenceClassification` with one label, so that what is exported
loads there.

Shape legend: S sequences, B pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from otpo.data.collate import collate_completions
from otpo.data.rows import BadRow, Row, Text, number_of
from otpo.data.tokens import load_tokenizer, tokenize_answers
from otpo.errors import UserError, WorkError
from otpo.methods.spec import MethodSpec
from otpo.models.policy import PolicyModel, without_dropout
from otpo.records import LossOutput, SequenceBatch, TokenCompletion, TokenPair
from otpo.training.step import LossFunction, micro_batches

# ---- the model ----


class RewardModel(PolicyModel):
    """A decoder with a scalar head: only `states` and `scores` are of use, there is no vocabulary to predict."""

    def scores(self, batch: SequenceBatch) -> Tensor:
        """(S,) float32 score of each sequence. The head's product is float32: bfloat16 would tie close scores."""
        head = self.lm.get_parameter("score.weight")
        return self.states(batch, last=True).float() @ head[0].float()


def load_reward_lm(
    path: str | Path, *, new_head: bool = False, pad_id: int | None = None, attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """A reward model as transformers knows it, in the precision it was saved in, dropout off.

    Args:
        path: a reward model, or with `new_head` also a causal LM.
        new_head: give a model without a head one of zeros, to be trained: it scores every answer 0, so that the loss
            begins at log 2 and no seed matters.
        pad_id: put into the configuration in place of what is there. transformers reads the score at the last token
            that is not this one, so no answer may end in it (see `pad_token`).

    Raises:
        UserError: there is no such model, transformers has no classifier of its architecture, or it has no scalar head.
    """
    try:
        lm, info = AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=1, dtype="auto", attn_implementation=attn_implementation, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"No reward model could be loaded from '{path}': {str(error).splitlines()[0]}") from error
    missing = set(info["missing_keys"])
    if not isinstance(getattr(lm, "score", None), torch.nn.Linear) or missing - {"score.weight"}:
        raise UserError(
            f"expected a decoder with a scalar head (`score.weight`) at '{path}', found {type(lm).__name__}"
            f"{' without ' + ', '.join(sorted(missing)[:3]) if missing else ''}."
        )
    if missing and not new_head:
        raise UserError(
            f"'{path}' is no reward model: expected `score.weight` among its weights. Train one with"
            " `method: reward-model`, or give a folder of AutoModelForSequenceClassification with one label."
        )
    if missing:
        torch.nn.init.zeros_(lm.score.weight)
    if pad_id is not None:
        lm.config.pad_token_id = pad_id
    return without_dropout(lm)


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """A special token to pad scored answers with: the tokenizer's own unless answers end in it, else another one.

    None where every special token is EOS: such a model scores one answer at a time in transformers.
    """
    tokens = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    return next((token for token in tokens if token is not None and token != tokenizer.eos_token_id), None)


# ---- training ----


def reward_losses(model: RewardModel, spec: MethodSpec, margins: Mapping[int, float] | None = None) -> LossFunction:
    """The loss of a reward model as a function of a batch of pairs.

    Args:
        margins: data row -> by how much its chosen answer is better.
    """
    loss = spec.method.loss.function

    def losses(batch: SequenceBatch) -> LossOutput:
        sides, lengths = list(model.scores(batch).chunk(2)), list(batch.mask.sum(-1).chunk(2))
        rows = batch.rows[: len(sides[0])].tolist()
        _check_finite(sides, rows)
        if spec.hyperparameters["swap_answers"]:
            sides, lengths = sides[::-1], lengths[::-1]
        wanted = None
        if margins is not None:
            wanted = torch.tensor([margins.get(row, 0.0) for row in rows], device=batch.rows.device)
        output = loss(*sides, wanted, **spec.arguments(loss))
        about = {"lengths/chosen": lengths[0], "lengths/rejected": lengths[1]}
        return LossOutput(output.losses, output.metrics | about)

    return losses


def _check_finite(sides: list[Tensor], rows: list[int]) -> None:
    bad = (~torch.isfinite(torch.stack(sides))).cpu()
    if bad.any():
        found = [
            f"data row {rows[index]}, {('chosen', 'rejected')[side]} answer" for side, index in bad.nonzero().tolist()
        ]
        raise WorkError(
            f"Expected finite scores from the reward model, found NaN or infinity in {'; '.join(found[:8])}. Look at"
            " these rows; if they are sound, lower the learning rate or train in float32."
        )


def margins_of(rows: Sequence[Row], pairs: Sequence[TokenPair], source: str) -> dict[int, float] | None:
    """The column `margin` of the pairs' rows, None where no row has one.

    Raises:
        UserError: a pair without a margin, or with one that is no finite number.
    """
    if all(rows[pair.row].get("margin") is None for pair in pairs):
        return None
    margins = {}
    for pair in pairs:
        try:
            margins[pair.row] = number_of(rows[pair.row], "margin")
        except BadRow as reason:
            raise UserError(
                f"{source}: row {pair.row}: {reason}, and other rows have one. Every pair of a reward model needs a"
                " finite `margin`, or none of them may have that column."
            ) from None
        if not math.isfinite(margins[pair.row]):
            raise UserError(f"{source}: row {pair.row}: expected a finite margin, found {margins[pair.row]}.")
    return margins


def save_margins(path: str | Path, margins: Mapping[int, float]) -> None:
    """Write margins as safetensors: `rows` int64, `margins` float32."""
    rows, values = np.array(list(margins), np.int64), np.array(list(margins.values()), np.float32)
    save_file({"rows": rows, "margins": values}, path)


def load_margins(path: str | Path) -> dict[int, float]:
    """What `save_margins` wrote."""
    arrays = load_file(path)
    return dict(zip(arrays["rows"].tolist(), arrays["margins"].tolist(), strict=True))


# ---- use ----


class Scorer:
    """A reward model in this process: one trained here, or any decoder with one label that transformers classifies by.

    Args:
        folder: of the model and its tokenizer.
        template: "chat" puts strings into the tokenizer's chat template, "literal" takes them as they are; "auto" is
            "chat" where the tokenizer has a template. It must be what the model was trained with.
        batch_size: answers at a time. device: by default the GPU where there is one.

    Raises:
        UserError: no reward model there.
    """

    def __init__(
        self, folder: str | Path, *, template: str = "auto", batch_size: int = 16, device: str | None = None
    ) -> None:
        self.folder, self.batch_size = folder, batch_size
        self.tokenizer = load_tokenizer(folder)
        chat = template == "chat" or (template == "auto" and self.tokenizer.chat_template)
        self.template = "chat" if chat else "auto"
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = RewardModel(load_reward_lm(folder)).eval().to(self.device)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Text], answers: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> list[float]:
        """The score of each answer to its prompt, higher is better; it means something beside others of the prompt.

        Args:
            prompts: strings, or lists of messages, one an answer. answers: strings; empty ones are scored too.
            progress: called with (done, total).

        Raises:
            UserError: a prompt that cannot be rendered. WorkError: a score that is not finite.
        """
        pad = self.model.lm.config.pad_token_id
        items = tokenize_answers(prompts, answers, self.tokenizer, template=self.template)
        items = [_as_transformers_reads(item, pad) for item in items]
        scores = [math.nan] * len(items)
        done = 0
        for indices in micro_batches([item.tokens for item in items], size=self.batch_size, rank=0, world=1):
            batch = collate_completions([items[i] for i in indices]).to(self.device)
            for index, value in zip(indices, self.model.scores(batch).tolist(), strict=True):
                scores[index] = value
            done += len(indices)
            if progress:
                progress(done, len(items))
        return _all_finite(scores, self.folder)


def score(
    folder: str | Path, prompts: Sequence[Text], answers: Sequence[str], *, template: str = "auto"
) -> list[float]:
    """The score of each answer to its prompt by the reward model in a folder; see `Scorer`."""
    return Scorer(folder, template=template)(prompts, answers)


def _all_finite(scores: list[float], folder: str | Path) -> list[float]:
    bad = [index for index, value in enumerate(scores) if not math.isfinite(value)]
    if bad:
        raise WorkError(
            f"The reward model {folder} gave {len(bad)} scores that are not finite, first to answer {bad[0]}."
        )
    return scores


def _as_transformers_reads(item: TokenCompletion, pad: int | None) -> TokenCompletion:
    """Without padding tokens at its end: a model that was trained with EOS as its padding never looks at EOS."""
    ids = item.completion_ids
    while len(ids) > 1 and ids[-1] == pad:
        ids = ids[:-1]
    return replace(item, completion_ids=ids)
