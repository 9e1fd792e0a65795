"""What a notebook asks of the science: the token weights of one pair of texts, and one loss on tensors.

Shape legend: B pairs, T padded length of a side's completions (it may differ between the sides), D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from otpo.data.template import as_trained, trained_kwargs
from otpo.data.tokens import load_tokenizer, tokenize_pairs
from otpo.errors import UserError
from otpo.explain import model_token_weights
from otpo.methods import weights as rules
from otpo.methods.finite import not_finite, pair_sides
from otpo.methods.losses import pair_loss
from otpo.methods.registry.rows import FROZEN_MODELS
from otpo.methods.spec import MethodSpec, resolve
from otpo.records import LogProbs, LossOutput, PairLogProbs

if TYPE_CHECKING:
    import pandas as pd

Messages = list[dict[str, str]]
VOCABULARY = ("log_sum_squares", "reference_kl")


def token_weights(
    model: str | Path,
    prompt: str | Messages,
    chosen: str | Messages,
    rejected: str | Messages,
    *,
    method: str = "otpo",
    template: str = "auto",
    seed: int = 0,
    **hyperparameters: Any,
) -> pd.DataFrame:
    """Weight every token of a chosen and a rejected completion, as the first step of a training would.

    Args:
        model: folder or hub name; it is loaded in float32, on a GPU if there is one.
        prompt, chosen, rejected: strings, or lists of messages (`{"role": ..., "content": ...}`).
        method: whose rule, for example "otpo"; `otpo methods` lists them.
        template: as `data.template` of a recipe. "auto": as the model was trained here; for a model from elsewhere
            messages go through the tokenizer's chat template and strings are taken as they are. "chat": strings too are
            wrapped as messages.
        seed: of rules that sample.
        hyperparameters: of the method, for example `reg=0.05`. Frozen models that a rule reads are named in the same
            way: `oracle="folder"`.

    Returns:
        A row for each completion token, the chosen side first: `side`, `position` (from 0), `token_id`, `token` (its
        text) and `weight`. `attrs["metrics"]` holds figures of the pair, such as its effective tokens.

    Raises:
        UserError: an unknown method or hyperparameter, no such model, or texts that make no pair.
        WorkError: the model's numbers are not finite.
    """
    import pandas as pd

    spec = _of_pairs(resolve(method, hyperparameters), "token_weights")
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    items, _ = tokenize_pairs(
        [row],
        load_tokenizer(model),
        template=as_trained(template, model),
        max_length=None,
        chat_template_kwargs=trained_kwargs(model),
        source="the pair",
    )
    found = model_token_weights(str(model), items, spec, seed=seed)[0]
    sides = [
        pd.DataFrame(
            {
                "side": side,
                "position": range(len(found[f"{side}_ids"])),
                "token_id": found[f"{side}_ids"],
                "token": found[f"{side}_tokens"],
                "weight": found[f"{side}_weights"],
            }
        )
        for side in ("chosen", "rejected")
    ]
    table = pd.concat(sides, ignore_index=True)
    table.attrs["metrics"] = found["metrics"]
    return table


def loss(
    method: str = "otpo",
    *,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    chosen_hidden: Tensor | None = None,
    rejected_hidden: Tensor | None = None,
    extra: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    seed: int = 0,
    **hyperparameters: Any,
) -> LossOutput:
    """The loss of a preference method on a batch of pairs: its token weights, then its loss.

    Args:
        method: for example "dpo" or "otpo"; `otpo methods` lists them. Methods of pairs only: KTO and the reward model
            take other data.
        chosen_logps, rejected_logps: (B, T) log-probability that the policy gives each completion token (prompt tokens
            left out), with gradient.
        chosen_mask, rejected_mask: (B, T) bool, True on completion tokens.
        ref_chosen_logps, ref_rejected_logps: (B, T) the same of the reference, for methods that have one.
        chosen_hidden, rejected_hidden: (B, T, D) the policy's last hidden states at the positions that predict the
            completion tokens, for methods with transport weights (OTPO).
        extra: what a few methods read besides, a tensor (B, T) a side: log-probabilities of other frozen models
            ("oracle", "positive", "negative") and figures of the policy over its whole vocabulary ("log_sum_squares",
            "reference_kl", see `otpo.records.LogProbs`).
        seed: of weight rules that sample.
        hyperparameters: of the method, for example `beta=0.1`; what is left out takes the method's default.

    Returns:
        `losses` (B,), with gradient and not reduced, and `metrics`: name -> (B,), under TRL's names
        ("rewards/margins", ...).

    Raises:
        UserError: an unknown method or hyperparameter, a tensor that the method needs and that is not given, or one of
            another shape than its mask, or a number that is not finite on a completion token.
    """
    given = dict(extra or {})
    if unknown := [name for name in given if name not in (*FROZEN_MODELS, *VOCABULARY)]:
        raise UserError(f"loss: extra has {unknown[0]!r}: expected {', '.join((*FROZEN_MODELS, *VOCABULARY))}.")
    models = {name: "given" for name in FROZEN_MODELS if name in given}
    spec = _of_pairs(resolve(method, hyperparameters | models), "loss")
    if ref_chosen_logps is not None and ref_rejected_logps is not None:
        given["reference"] = (ref_chosen_logps, ref_rejected_logps)
    if chosen_hidden is not None and rejected_hidden is not None:
        given["hidden"] = (chosen_hidden, rejected_hidden)
    arguments = {
        "reference": "ref_chosen_logps and ref_rejected_logps",
        "hidden": "chosen_hidden and rejected_hidden",
    }
    for name in sorted(spec.method.needs - given.keys()):
        raise UserError(f"loss: {spec.method.title} needs {arguments.get(name, f'extra[{name!r}]')}.")

    def side(number: int, name: str, logps: Tensor, mask: Tensor) -> LogProbs:
        of_side = {key: values[number] for key, values in given.items()}
        for key, values in {"logps": logps, **of_side}.items():
            if values.shape[:2] != mask.shape or mask.dim() != 2:
                raise UserError(
                    f"loss: {name}_mask has the shape {tuple(mask.shape)}, {key} of that side {tuple(values.shape)}:"
                    " expected (B, T) for both, hidden states (B, T, D)."
                )
        mask = mask.bool()
        hidden = of_side.pop("hidden", None)
        # padding may hold anything, NaN too
        clean = {key: values.float().masked_fill(~mask, 0.0) for key, values in {"": logps, **of_side}.items()}
        return LogProbs(
            policy=clean.pop(""),
            mask=mask,
            rows=torch.arange(len(mask), device=mask.device),
            frozen={key: values.detach() for key, values in clean.items() if key not in VOCABULARY},
            vocabulary={key: values for key, values in clean.items() if key in VOCABULARY},
            hidden=None if hidden is None else hidden.detach().float().masked_fill(~mask[..., None], 0.0),
        )

    pairs = PairLogProbs(
        side(0, "chosen", chosen_logps, chosen_mask), side(1, "rejected", rejected_logps, rejected_mask)
    )
    if len(pairs.chosen.mask) != len(pairs.rejected.mask):
        raise UserError(
            f"loss: {len(pairs.chosen.mask)} chosen completions and {len(pairs.rejected.mask)} rejected ones: expected"
            " as many of both."
        )
    _check_given(pairs)
    if spec.hyperparameters["swap_answers"]:
        pairs = PairLogProbs(pairs.rejected, pairs.chosen)
    with torch.no_grad():
        weights = rules.token_weights(spec, pairs, seed=seed)
    return pair_loss(spec, pairs, weights)


def _check_given(pairs: PairLogProbs) -> None:
    """Refuse what would come back as a loss of NaN."""
    for what, flags in not_finite(pair_sides(pairs)).items():
        if wrong := flags.nonzero()[:, 0].tolist():
            some = f"pair{'s' * (len(wrong) > 1)} {', '.join(map(str, wrong[:8]))}{', ...' * (len(wrong) > 8)}"
            raise UserError(
                f"loss: expected finite numbers wherever a mask is True, found NaN or infinity in {what}, {some}"
                " (counted from 0). Mask positions that are no completion tokens; where a model itself gives such"
                " numbers, run it in float32."
            )


def _of_pairs(spec: MethodSpec, where: str) -> MethodSpec:
    if spec.method.objective != "pair":
        raise UserError(f"{where}: {spec.method.title} weights no tokens of pairs: expected a method of pairs.")
    return spec
