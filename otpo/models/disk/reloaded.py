"""Whether an exported folder is the model that was trained, found by loading it with plain transformers.

Weights must come back to the last bit, as they were rounded. The values of a few rows (log-probabilities, or a reward
model's scores) must be those of the trained model within its precision: they also depend on the configuration, on
buffers that are not saved, and on how a tokenizer pads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from otpo.errors import WorkError
from otpo.models.policy import PolicyModel
from otpo.models.reward_model import RewardModel
from otpo.records import SequenceBatch
from otpo.training.forward_check import TOLERANCES, Difference, without_adapters_dropout

SHOWN = 4  # names of weights in a message


@dataclass(frozen=True)
class Trained:
    """What the trained model gives for a few rows.

    Attributes:
        batch: the rows, on the CPU.
        values: (n,) log-probabilities of their completions' tokens, or (S,) scores.
        dtype: that training computed in.
    """

    batch: SequenceBatch
    values: Tensor
    dtype: torch.dtype


@torch.no_grad()
def trained_values(model: PolicyModel | RewardModel, batch: SequenceBatch, dtype: torch.dtype) -> Trained:
    """Compute rows with the trained model. All ranks must call it with the same rows.

    Args:
        batch: on the model's device.
        dtype: that the model computes in.
    """
    with without_adapters_dropout(model):
        values = model.scores(batch) if isinstance(model, RewardModel) else model(batch)[0][batch.mask]
    return Trained(batch.to("cpu"), values.float().cpu(), dtype)


@torch.no_grad()
def check_reloaded(folder: Path, kind: type, weights: Iterable[tuple[str, Tensor]], trained: Trained | None) -> None:
    """Load an exported folder as its users do, on the CPU, and compare it with what was trained.

    Args:
        kind: `PolicyModel` or `RewardModel`.
        weights: names and weights as they were given to be saved, one after the other; tied ones may be left out.
        trained: None compares weights alone.

    Raises:
        WorkError: it cannot be loaded, or is another model.
    """
    auto: Any = AutoModelForSequenceClassification if kind is RewardModel else AutoModelForCausalLM
    kept = f"It is kept at {folder} and was not given its name, so that nobody uses it by mistake."
    try:
        lm, info = auto.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except Exception as error:  # whatever transformers finds wrong with its own folder
        raise WorkError(f"The exported model cannot be loaded again: {error}. {kept}") from error
    wrong = {name: sorted(info[f"{name}_keys"])[:SHOWN] for name in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        names = ", ".join(f"{name} {names}" for name, names in wrong.items() if names)
        raise WorkError(f"The exported model is not whole: loaded again, its weights are {names}. {kept}")
    own = lm.state_dict()
    apart = {name: _apart(tensor, own.get(name)) for name, tensor in weights}
    apart = {name: by for name, by in apart.items() if by != 0}
    if apart:
        names = ", ".join(f"{name} (by {by:.3g})" for name, by in list(apart.items())[:SHOWN])
        raise WorkError(f"The exported model is another one: {len(apart)} weights differ, as {names}. {kept}")
    if trained is None:
        return
    found = _difference(trained.values, _values(lm.eval(), kind, folder, trained.batch))
    tolerance = TOLERANCES[min(lm.dtype, trained.dtype, key=lambda dtype: dtype.itemsize)]
    if not found.within(tolerance):
        what = "score" if kind is RewardModel else "log-probability of a token"
        raise WorkError(
            f"The exported model is another one: loaded by plain transformers, a {what} {found} (expected at most"
            f" {tolerance.worst:g}, {tolerance.mean:g} on average), the worst is {found.found:.4f} for {found.own:.4f}"
            f" as trained. {kept}"
        )


def _apart(one: Tensor, other: Tensor | None) -> float:
    if other is None or one.shape != other.shape or one.dtype != other.dtype:
        return float("inf")
    return 0.0 if torch.equal(one, other) else float((one.double() - other.double()).abs().max())


def _values(lm: PreTrainedModel, kind: type, folder: Path, batch: SequenceBatch) -> Tensor:
    if kind is not RewardModel:
        return PolicyModel(lm).own_logprobs(batch)[batch.mask]
    pieces = [piece.tolist() for piece in batch.input_ids.split(batch.segments)]
    sequences = [pieces[prompt] + pieces[completion] for prompt, completion in batch.sequences]
    inputs = AutoTokenizer.from_pretrained(folder).pad({"input_ids": sequences}, return_tensors="pt")
    with RewardModel(lm).backbone.padding():
        return lm(**inputs, use_cache=False).logits[:, 0].float()


def _difference(trained: Tensor, found: Tensor) -> Difference:
    """As `otpo.training.forward_check.difference`, on this rank alone."""
    apart = ((found - trained).abs() / trained.abs().clamp(min=1)).nan_to_num(float("inf"), float("inf"))
    at = int(apart.argmax())
    return Difference(float(apart[at]), float(apart.mean()), own=float(trained[at]), found=float(found[at]))
