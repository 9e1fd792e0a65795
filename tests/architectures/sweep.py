"""One architecture through what a run does with a model: read, checked, trained, exported, read again.

The oracle is transformers' own forward pass: each sequence alone, eager attention, whole logits in float32.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging

from otpo.data.collate import collate_pairs
from otpo.errors import UserError
from otpo.models.disk.architecture import check_language_model
from otpo.models.export import export
from otpo.models.fresh import make_tokenizer
from otpo.models.loading import load_causal_lm
from otpo.models.policy import PolicyModel
from otpo.models.sharding import distribute
from otpo.records import SequenceBatch, TokenPair
from otpo.training.forward_check import check_forward, check_repeats

TOLERANCE = 1e-5
PAIRS = [
    TokenPair(0, [5, 6, 7, 8, 9], [8, 9, 10, 11, 12, 13, 14], [13, 14]),
    TokenPair(1, [21], [22], [23, 24, 25, 26, 27, 28, 29]),
    TokenPair(2, [31, 132, 33, 234, 35, 36], [37, 38, 39], [140, 41, 242]),
]
SEQUENCES = [(p.prompt_ids, p.chosen_ids) for p in PAIRS] + [(p.prompt_ids, p.rejected_ids) for p in PAIRS]


@dataclass(frozen=True)
class Row:
    """What became of an architecture.

    Attributes:
        outcome: "equal", "refused" or "not built".
        layout: "shared prompts" or "padded".
        words: the refusal, or why it was not built.
    """

    name: str
    model: str
    outcome: str
    layout: str = ""
    words: str = ""


class Differs(AssertionError):
    """A number that is not what it has to be, and no refusal."""


def plain_logprobs(lm: PreTrainedModel) -> Tensor:
    """Log-probabilities of the completions' tokens by the model's own forward pass."""
    values = []
    with torch.no_grad():
        for prompt, completion in SEQUENCES:
            logits = lm(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits
            logps = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            values.append(logps.gather(-1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(values)


def same(what: str, found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    difference = (found - expected).abs().max().item()
    if not difference <= tolerance * max(1.0, expected.abs().max().item()):
        raise Differs(f"{what}: differs by {difference:.2g}")


def check(lm: PreTrainedModel, folder: Path, mesh: DeviceMesh) -> tuple[str, str]:
    """Save a model, and do with the folder what a run does; (layout, remarks).

    Raises:
        UserError: it was refused.
        Differs: a wrong number went through.
    """
    lm.save_pretrained(folder)
    attention = attention_of(folder)
    model, batch, layout = _start(folder, mesh, attention)
    expected = plain_logprobs(type(lm).from_pretrained(folder, attn_implementation="eager").eval())
    with torch.no_grad():
        same("log-probabilities", model(batch)[0][batch.mask], expected)
    gradients = _gradients(model, batch)
    remark = _check_checkpointing(folder, mesh, batch, attention, expected, gradients)
    torch.optim.AdamW(model.parameters(), lr=1e-2).step()
    with torch.no_grad():
        trained = model(batch)[0][batch.mask]
    if (trained - expected).abs().max() < 1e-3:
        raise Differs("a step changed nothing")
    out = folder / "trained"
    make_tokenizer(["some text"], 300).save_pretrained(folder / "tokenizer")
    export(model, out, tokenizer=str(folder / "tokenizer"), card="", dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    same("exported, read by transformers", plain_logprobs(again), trained)
    ours, _, _ = _start(out, mesh, attention)
    with torch.no_grad():
        same("exported, read by a run", ours(batch)[0][batch.mask], trained)
    return layout, ", ".join(filter(None, ["" if attention == "sdpa" else attention, remark]))


def attention_of(folder: Path) -> str:
    """What a run's first check says: sdpa, or eager where an architecture has no sdpa and the refusal says so."""
    try:
        check_language_model(folder)
    except UserError as error:
        if "model.attn_implementation=eager" not in str(error):
            raise
        check_language_model(folder, attn_implementation="eager")
        return "eager"
    return "sdpa"


def _start(
    folder: Path, mesh: DeviceMesh, attention: str, *, checkpointing: bool = False
) -> tuple[PolicyModel, SequenceBatch, str]:
    """(policy, batch, layout) as a run starts them, after the checks that it makes before its first step."""
    lm = load_causal_lm(folder, attn_implementation=attention)
    model = distribute(PolicyModel(lm), mesh, dtype=torch.float32, activation_checkpointing=checkpointing)
    model.train(checkpointing)
    batch = collate_pairs(PAIRS)
    found = check_forward(model, batch, torch.float32, name=str(folder))
    check_repeats(model, batch, torch.float32, found.values, name=str(folder))
    layout = {"flat": "shared prompts", "padded": "padded"}[found.layout]
    return model, batch, layout + (", own head" if found.head == "own" else "")


def _gradients(model: PolicyModel, batch: SequenceBatch) -> dict[str, Tensor]:
    model.zero_grad()
    logps = model(batch)[0][batch.mask]
    factors = torch.randn(len(logps), generator=torch.Generator().manual_seed(1))
    (logps * factors).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _check_checkpointing(
    folder: Path, mesh: DeviceMesh, batch: SequenceBatch, attention: str, expected: Tensor, gradients: dict[str, Tensor]
) -> str:
    """Activation checkpointing computes the same numbers, or says that the architecture has none."""
    if not check_language_model(folder, attn_implementation=attention).recomputes:
        return "no activation checkpointing"
    model, _, _ = _start(folder, mesh, attention, checkpointing=True)
    with torch.no_grad():
        same("activation checkpointing", model(batch)[0][batch.mask], expected)
    found = _gradients(model, batch)
    if found.keys() != gradients.keys():
        raise Differs(f"gradients of other weights with activation checkpointing: {found.keys() ^ gradients.keys()}")
    for name, gradient in gradients.items():
        same(f"gradient of {name} with activation checkpointing", found[name], gradient, 1e-4)
    return ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says about tiny models."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(before)
        logging.disable(logging.NOTSET)
