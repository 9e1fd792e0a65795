"""Whether training computes what the model itself computes, tried on a batch.

The model's own forward is the truth. Where training's faster ways of computing differ from it, slower ones take their
place; where nothing agrees, the model is refused. All ranks compute the same batch and agree on every outcome.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from otpo.data.collate import collate_completions
from otpo.errors import UserError
from otpo.models.backbone import set_mode
from otpo.models.policy import PolicyModel
from otpo.models.reward_model import RewardModel
from otpo.records import SequenceBatch, TokenCompletion

Model = PolicyModel | RewardModel


@dataclass(frozen=True)
class Tolerance:
    """How far two computations of a log-probability (or of a score) x may lie apart, as a fraction of max(1, |x|).

    Attributes:
        worst: of a single token.
        mean: over all tokens.
    """

    worst: float
    mean: float


TOLERANCES = {
    # sums of a few thousand products, in another order, differ by some hundred units of 2^-24
    torch.float32: Tolerance(worst=1e-4, mean=1e-4),
    # 2^-8 of a logit of 20 is 0.08: a token may differ by several of these (and by more where a router's choice
    # between experts is close), but errors of rounding have either sign and stay small in the mean
    torch.bfloat16: Tolerance(worst=1.0, mean=0.05),
    torch.float16: Tolerance(worst=0.25, mean=0.02),
}


@dataclass(frozen=True)
class Difference:
    """Between the log-probabilities of a model's own forward and those that training computes.

    Attributes:
        worst, mean: in units of max(1, |log-probability|), over all tokens and ranks.
        row: the data row of the worst token on this rank. own, found: its log-probability both ways.
        reason: why there are no log-probabilities to compare, or "".
    """

    worst: float
    mean: float
    row: int = -1
    own: float = math.nan
    found: float = math.nan
    reason: str = ""

    def within(self, tolerance: Tolerance) -> bool:
        """Whether it is an error of rounding."""
        return self.worst <= tolerance.worst and self.mean <= tolerance.mean

    def __str__(self) -> str:
        if self.reason:
            return self.reason
        return f"differs by up to {self.worst:.2g}, {self.mean:.2g} on average"


@dataclass(frozen=True)
class ForwardCheck:
    """How a model's log-probabilities (or scores) compare with its own forward.

    Attributes:
        layout: "flat" (a prompt is computed once for all its completions) or "padded".
        head: "fused", or "own" where the model's own head is run.
        difference: of the way that is used.
        fallbacks: for each faster way that was given up, what it is and what was wrong with it.
        also: of the padded layout, where flat batches are used.
        values: (n,) what training computed: the log-probabilities of all tokens, or the scores.
    """

    layout: str
    head: str
    difference: Difference
    values: Tensor
    fallbacks: tuple[str, ...] = ()
    also: Difference | None = None


@torch.no_grad()
def check_forward(model: Model, batch: SequenceBatch, dtype: torch.dtype, *, name: str = "") -> ForwardCheck:
    """Compare a model with its own forward, and let it compute in the fastest way that agrees. Changes no random state.

    The ways, in order: flat batches with the fused head; padded batches; the model's own head.

    Args:
        batch: the same on all ranks, on the model's device.
        dtype: that the model computes in; decides the tolerance.
        name: of the model, for messages.

    Raises:
        UserError: no way agrees, or the model's own forward fails, is not finite, or looks at tokens that follow.
    """
    tolerance, model_name = TOLERANCES[dtype], name or model.lm.name_or_path or type(model.lm).__name__
    values = _scoring(model, batch) if isinstance(model, RewardModel) else _predicting(model, batch)
    fallbacks: list[str] = []
    with quietly(model):
        truth = _truth(values.own, model_name)
        if isinstance(model, PolicyModel):
            _check_causal(model, batch, truth, tolerance, model_name)
        for layout, head, take in _ways(model):
            take()
            found, computed = _difference(model, truth, values)
            if found.within(tolerance):
                also = None
                if layout == "flat":
                    with model.backbone.padding():
                        also, _ = _difference(model, truth, values)
                return ForwardCheck(layout, head, found, computed, tuple(fallbacks), also)
            fallbacks.append(f"{layout} batches, {head} head: {found}")
    raise UserError(_refusal(model, batch, model_name, fallbacks, found, tolerance))


def check_repeats(model: Model, batch: SequenceBatch, dtype: torch.dtype, before: Tensor, *, name: str = "") -> float:
    """Compute a batch twice in the mode that training uses, with other random numbers; the largest difference.

    The adapters' dropout, which was asked for, is off meanwhile. Gradients are on, so that a compiled model compiles
    what it needs anyway. On a device whose sums depend on the order in which threads finish, two passes with the same
    random numbers say how much that is.

    Args:
        before: `ForwardCheck.values`, which the model must still compute (compiled since then, for example).

    Raises:
        UserError: the model draws random numbers, or computes something else than before.
    """
    values = _scoring(model, batch) if isinstance(model, RewardModel) else _predicting(model, batch)
    name = name or model.lm.name_or_path or type(model.lm).__name__

    def computed(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return values.ours().detach().float()

    def apart(one: Tensor, other: Tensor) -> float:
        return agreed(float((one - other).abs().nan_to_num(math.inf, math.inf).max()))[0]

    with quietly(model), without_adapters_dropout(model):
        first = computed(1)
        found = apart(first, computed(2))
        if found and found > 10 * (noise := apart(first, computed(1))):
            raise UserError(
                f"{name} computes something else each time: the same batch, computed twice, differs by up to"
                f" {found:.3g} (by {noise:.3g} with the same random numbers). Something in it draws random numbers"
                " (dropout, a router's noise) although nothing asked for them, so losses would not be of the model that"
                " is trained. Switch it off in the model's config.json."
            )
    changed = difference(before, first, values.rows)
    if not changed.within(TOLERANCES[dtype]):
        raise UserError(
            f"{name}: what training computes {changed} from what the same model computed when it was loaded, most in"
            f" data row {changed.row}: {changed.own:.4f}, then {changed.found:.4f}. Leave train.torch_compile out if it"
            " is set."
        )
    return found


# ---- the two kinds of model ----


@dataclass(frozen=True)
class _Values:
    """The values of one batch that are compared, each (n,): the model's own, and as training computes them.

    Attributes:
        rows: (n,) the data row of each.
    """

    own: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    rows: Tensor


def _predicting(model: PolicyModel, batch: SequenceBatch) -> _Values:
    rows = batch.rows[:, None].expand_as(batch.mask)[batch.mask]
    return _Values(lambda: model.own_logprobs(batch)[batch.mask], lambda: model(batch)[0][batch.mask], rows)


def _scoring(model: RewardModel, batch: SequenceBatch) -> _Values:
    # a new head is zero and would hide every difference
    size = model.lm.config.get_text_config().hidden_size
    head = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(batch.rows.device) / math.sqrt(size)
    return _Values(lambda: model.own_scores(batch, head), lambda: model.scores(batch, head), batch.rows)


def _ways(model: Model) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """The ways to compute, from the fastest: (layout, head, what makes the model take it)."""
    fused = "own" if getattr(model, "own_head", False) else "fused"
    if model.backbone.shares_prompts:
        yield "flat", fused, lambda: None
    yield "padded", fused, model.backbone.pad
    if isinstance(model, PolicyModel) and not model.own_head:
        yield "padded", "own", model.use_own_head


def _truth(own: Callable[[], Tensor], name: str) -> Tensor:
    try:
        values = own().float()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # other people's code: anything may come
        raise UserError(
            f"{name}: the model's own forward fails on rows of the data ({type(error).__name__}: {error}). Try it with"
            " transformers alone; it may need other inputs than text."
        ) from error
    if not agreed(0.0 if values.isfinite().all() else 1.0)[0] == 0:
        raise UserError(f"{name}: the model's own forward gives values that are not finite on rows of the data.")
    return values


def _check_causal(model: PolicyModel, batch: SequenceBatch, truth: Tensor, tolerance: Tolerance, name: str) -> None:
    """Raise a `UserError` if a completion's log-probabilities change when its last token is taken away."""
    pieces = batch.input_ids.split(batch.segments)
    lengths = batch.mask.sum(-1)
    index = int(lengths.where(lengths > 1, lengths.max()).argmin())  # a short one
    prompt, completion = (pieces[segment].tolist() for segment in batch.sequences[index])
    if len(completion) < 2:
        return
    row = int(batch.rows[index])
    shorter = collate_completions([TokenCompletion(row, prompt, completion[:-1])]).to(batch.input_ids.device)
    start = int(batch.mask[:index].sum())
    whole = truth[start : start + len(completion) - 1]
    found = difference(whole, model.own_logprobs(shorter)[0], shorter.rows.expand_as(whole))
    if not found.within(tolerance):
        raise UserError(
            f"{name} is no causal language model: the log-probability of a token in data row {row} is {found.own:.4f}"
            f" with the token that ends the completion and {found.found:.4f} without it, so the model looks at tokens"
            " that follow. Take a decoder (for some encoders, `is_decoder: true` in config.json)."
        )


def _difference(model: Model, truth: Tensor, values: _Values) -> tuple[Difference, Tensor]:
    reason, found = "", truth * math.nan
    try:
        found = values.ours().float()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # other people's code; another way may work
        if isinstance(model, FSDPModule):
            model.reset_iter_state()  # the pass ended in its middle
        reason = f"fails ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    return difference(truth, found, values.rows, reason), found


def difference(truth: Tensor, found: Tensor, rows: Tensor, reason: str = "") -> Difference:
    """Between two computations of the same values, each (n,), of the data rows (n,). All ranks must call it."""
    apart = ((found - truth).abs() / truth.abs().clamp(min=1)).nan_to_num(math.inf, math.inf)
    at = int(apart.argmax())
    worst, mean = agreed(float(apart[at]), float(apart.mean()))
    return Difference(worst, mean, int(rows[at]), float(truth[at]), float(found[at]), reason)


def _refusal(
    model: Model, batch: SequenceBatch, name: str, fallbacks: list[str], found: Difference, tolerance: Tolerance
) -> str:
    kind = "scores" if isinstance(model, RewardModel) else "log-probabilities"
    text = (
        f"{name}: training would not compute the {kind} that the model itself computes: in every way they lie too far"
        f" apart ({'; '.join(fallbacks)}; expected at most {tolerance.worst:g}, {tolerance.mean:g} on average). The"
        f" worst is in data row {found.row}: {found.own:.4f} by the model's own forward, {found.found:.4f} in training."
    )
    if isinstance(model, PolicyModel):
        return text + " Train another model, or report this one with its config.json."
    pad = model.lm.config.get_text_config().pad_token_id
    last = batch.targets.gather(1, batch.mask.sum(-1, keepdim=True) - 1)[:, 0]
    if pad is not None and (last == pad).any():
        return text + (
            f" Completions end in token {pad}, which is also the padding token (`pad_token_id`): transformers reads the"
            " score before it. Give the tokenizer a padding token of its own, in tokenizer_config.json and config.json."
        )
    return text + " Train another model as reward model."


# ---- ranks, modes and random numbers ----


def agreed(*values: float) -> list[float]:
    """The largest of each value over the ranks: every rank then decides alike, and none waits for another."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


@contextmanager
def quietly(model: Model) -> Iterator[None]:
    """Leave the random state as it was."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def without_adapters_dropout(model: Any) -> Iterator[None]:
    """Compute as in training, but for the dropout that a recipe asks for."""
    training = model.training
    set_mode(model.lm, False)
    try:
        yield
    finally:
        set_mode(model.lm, training)
