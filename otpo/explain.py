"""Token weights of a model on preference pairs, with each token's text: what `otpo weights` and the report show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d

from otpo.data.collate import collate_pairs
from otpo.data.tokens import check_same_tokens, load_tokenizer
from otpo.methods.finite import check_finite
from otpo.methods.spec import MethodSpec
from otpo.methods.weights import token_weights
from otpo.methods.weights.otpo import transport_log_plan
from otpo.models.loading import load_causal_lm
from otpo.models.policy import PolicyModel, pair_logprobs
from otpo.records import PairLogProbs, TokenPair, TokenWeights

REGS = (0.03, 0.1, 0.3, 1.0)
REG_MS = (0.1, 0.2, 0.5, 1.0)
COARSE = 48  # rows and columns, at most, of a transport plan in a grid


@torch.no_grad()
def model_token_weights(
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
    """Load a model in float32 and weight every completion token of the pairs by a method's rule.

    Args:
        model: folder or hub name. items: pairs, tokenized with this model's tokenizer. spec: the method.
        frozen_models: the frozen models that the rule reads: name -> folder or hub name; by default those that `spec`
            names, with `model` as their reference.
        batch_size: pairs in a forward pass. seed: of rules that sample tokens.
        plan: add each pair's transport plan, for rules that have one.
        grid: add `grid`, the cells of `token_weight_grid`, for the same rules. A pair passes through the model once.

    Returns:
        One dictionary a pair, ready for JSON: the keys of `token_weight_rows`, and `label`, `method`, `prompt` (text),
        the tokens' texts `chosen_tokens` and `rejected_tokens`, and the weight 1 that every token has without a rule,
        `uniform_chosen` and `uniform_rejected`.

    Raises:
        UserError: a frozen model has another tokenizer.
        WorkError: a model gave NaN or infinity; the message names the data rows and sides.
    """
    tokenizer = load_tokenizer(model)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    named = dict(frozen_models or {})
    if frozen_models is None and spec.frozen_models:
        named = {"reference": model, **spec.frozen_models}

    for name, path in named.items():
        if path != model:
            check_same_tokens(name, path, tokenizer)

    def load(path: str) -> PolicyModel:
        return PolicyModel(load_causal_lm(path, attn_implementation=None).float()).to(device).eval()

    policy, frozen = load(model), {name: load(path) for name, path in named.items()}
    rows = []
    for start in range(0, len(items), batch_size):
        members = items[start : start + batch_size]
        pairs = _pair_logprobs(policy, members, spec, frozen)
        check_finite(pairs)
        found = token_weight_rows(spec, members, pairs, seed=seed, plan=plan)
        if grid and spec.method.weight_rule.name == "otpo":
            cells = token_weight_grid(spec, pairs)
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


def token_weight_rows(
    spec: MethodSpec, tokens: Sequence[TokenPair], pair: PairLogProbs, *, seed: int = 0, plan: bool = False
) -> list[dict[str, Any]]:
    """The token weights of pairs whose log-probabilities are known.

    Args:
        spec: the method.
        tokens: the B pairs, in the order of `pair`.
        pair: their log-probabilities, with what the weight rule needs.
        seed: of rules that sample tokens.
        plan: add `plan`, the m x n transport plan, for rules that have one. It is not rescaled: its marginals divided
            by `metrics["weights/transport_mass"]` are the weights.

    Returns:
        One dictionary a pair, ready for JSON: `row, prompt_ids, chosen_ids, rejected_ids, chosen_weights,
        rejected_weights, metrics`. The weights are those of the completion tokens, without padding.

    Raises:
        ValueError: `tokens` and `pair` differ in a completion's length.
    """
    weights = token_weights(spec, pair, seed=seed)
    plans = None
    if plan and spec.method.weight_rule.name == "otpo":
        plans = transport_log_plan(pair, **spec.arguments(transport_log_plan)).exp()
    rows = []
    for index, item in enumerate(tokens):
        m, n = len(item.chosen_ids), len(item.rejected_ids)
        found = (int(pair.chosen.lengths[index]), int(pair.rejected.lengths[index]))
        if found != (m, n):
            raise ValueError(f"data row {item.row}: the pair has {(m, n)} completion tokens, its record has {found}")
        row = {
            "row": item.row,
            "prompt_ids": list(item.prompt_ids),
            "chosen_ids": list(item.chosen_ids),
            "rejected_ids": list(item.rejected_ids),
            **_weights_of(weights, index, m, n),
        }
        if plans is not None:
            row["plan"] = plans[index, :m, :n].tolist()
        rows.append(row)
    return rows


def token_weight_grid(
    spec: MethodSpec, pair: PairLogProbs, *, regs: Sequence[float] = REGS, reg_ms: Sequence[float] = REG_MS
) -> list[list[dict[str, Any]]]:
    """The weights that the same hidden states would give at other values of `reg` and `reg_m`.

    Args:
        spec: a method weighted by `otpo`; its own `reg` and `reg_m` are added to the values.
        pair: B pairs with hidden states.
        regs, reg_ms: the values.

    Returns:
        For each pair the cells, `reg` outermost and both ascending: `reg, reg_m`, `asked` (whether these are the
        method's own), `chosen_weights, rejected_weights, metrics` as in `token_weight_rows`, and `plan`, averaged over
        blocks to at most COARSE x COARSE entries.
    """
    own = (float(spec.hyperparameters["reg"]), float(spec.hyperparameters["reg_m"]))
    cells: list[list[dict[str, Any]]] = [[] for _ in pair.chosen.lengths]
    for reg in sorted({*regs, own[0]}):
        for reg_m in sorted({*reg_ms, own[1]}):
            at = replace(spec, hyperparameters=spec.hyperparameters | {"reg": reg, "reg_m": reg_m})
            weights = token_weights(at, pair)
            plans = transport_log_plan(pair, **at.arguments(transport_log_plan)).exp()
            for index, found in enumerate(cells):
                m, n = int(pair.chosen.lengths[index]), int(pair.rejected.lengths[index])
                coarse = adaptive_avg_pool2d(plans[index, :m, :n][None], (min(m, COARSE), min(n, COARSE)))[0]
                cell = {"reg": reg, "reg_m": reg_m, "asked": (reg, reg_m) == own}
                found.append(cell | _weights_of(weights, index, m, n) | {"plan": coarse.tolist()})
    return cells


def _pair_logprobs(
    policy: PolicyModel, members: Sequence[TokenPair], spec: MethodSpec, frozen: Mapping[str, PolicyModel]
) -> PairLogProbs:
    """Log-probabilities of a few pairs, with what the method's weight rule reads."""
    batch = collate_pairs(members).to(next(policy.parameters()).device)
    logps, extras = policy(batch, {"hidden"} & spec.method.needs, layer=spec.layer)
    return pair_logprobs(logps, extras, batch, {name: model(batch)[0] for name, model in frozen.items()})


def _weights_of(weights: TokenWeights, index: int, m: int, n: int) -> dict[str, Any]:
    """One pair's weights without padding, and its metrics."""
    return {
        "chosen_weights": weights.chosen[index, :m].tolist(),
        "rejected_weights": weights.rejected[index, :n].tolist(),
        "metrics": {name: float(values[index]) for name, values in weights.metrics.items()},
    }
