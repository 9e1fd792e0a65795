"""Token weights of a model on preference pairs, with the tokens' texts: what `otpo weights` and the report show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from otpo.data.collate import collate_pairs
from otpo.data.tokens import load_tokenizer
from otpo.methods.spec import MethodSpec
from otpo.methods.weights.explain import explain_grid, explain_pairs
from otpo.methods.weights.rules import check_finite
from otpo.models.policy import PolicyModel, load_causal_lm, pair_logprobs
from otpo.records import PairLogProbs, TokenPair


@torch.no_grad()
def pair_token_weights(
    model: str,
    items: Sequence[TokenPair],
    spec: MethodSpec,
    frozen_models: Mapping[str, str] | None = None,
    *,
    batch_size: int = 8,
    seed: int = 0,
    plan: bool = False,
    grid: bool = False,
) -> list[dict[str, Any]]:
    """Load a model in float32 and pair_token_weights every token of the pairs by a method's rule.

    Args:
        model: folder or hub name. items: token pairs made with this model's tokenizer. spec: the method.
        frozen_models: that the rule reads: name -> folder or hub name; by default those that `spec` names, with `model`
            as their reference.
        plan: add the transport plan of each pair, for rules that have one.
        grid: add `grid`, the cells of `explain_grid`, for the same rules. A pair passes through the model once.

    Returns:
        The rows of `explain_pairs` with, beside them, `label`, `method`, `prompt` and the answers' tokens as text
        (`chosen_tokens`, `rejected_tokens`) and the weight 1 that every token has without a rule.

    Raises:
        WorkError: a model's numbers are NaN or infinite; the message names the data rows and sides.
    """
    tokenizer = load_tokenizer(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    named = dict(frozen_models or {})
    if frozen_models is None and spec.frozen_models:
        named = {"reference": model, **spec.frozen_models}

    def load(path: str) -> PolicyModel:
        return PolicyModel(load_causal_lm(path).float()).to(device).eval()

    policy, frozen = load(model), {name: load(path) for name, path in named.items()}
    rows = []
    for start in range(0, len(items), batch_size):
        members = items[start : start + batch_size]
        pairs = forward(policy, members, spec, frozen)
        check_finite(pairs)
        found = explain_pairs(spec, members, pairs, seed=seed, plan=plan)
        if grid and spec.method.weights == "otpo":
            cells = explain_grid(spec, pairs)
            found = [row | {"grid": of_row} for row, of_row in zip(found, cells, strict=True)]
        for row in found:
            texts = {
                f"{side}_tokens": [tokenizer.decode([i]) for i in row[f"{side}_ids"]] for side in ("chosen", "rejected")
            }
            rows.append(
                {"label": spec.label, "method": spec.method.title, "prompt": tokenizer.decode(row["prompt_ids"])}
                | row | texts | {"uniform_chosen": 1.0, "uniform_rejected": 1.0}
            )  # fmt: skip
    return rows


def forward(
    policy: PolicyModel,
    members: Sequence[TokenPair],
    spec: MethodSpec,
    frozen: Mapping[str, PolicyModel] | None = None,
) -> PairLogProbs:
    """Log-probabilities of a few pairs and what else the method's rule reads."""
    batch = collate_pairs(members).to(next(policy.parameters()).device)
    logps, extras = policy(batch, {"hidden"} & spec.method.needs, layer=spec.layer)
    return pair_logprobs(logps, extras, batch, {name: model(batch)[0] for name, model in (frozen or {}).items()})
