"""What each token of a pair weighs, and why: the data behind `otpo weights`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch.nn.functional import adaptive_avg_pool2d

from otpo.methods.spec import MethodSpec
from otpo.methods.weights.rules import token_weights, transport_log_plan
from otpo.records import PairLogProbs, TokenPair, TokenWeights

REGS = (0.03, 0.1, 0.3, 1.0)
REG_MS = (0.1, 0.2, 0.5, 1.0)
COARSE = 48  # entries a side of a plan that is only looked at


def explain_pairs(
    spec: MethodSpec, tokens: Sequence[TokenPair], pair: PairLogProbs, *, seed: int = 0, plan: bool = False
) -> list[dict[str, Any]]:
    """One JSON-ready dictionary per pair.

    Args:
        spec: the method.
        tokens: the B pairs, in the order of `pair`.
        pair: their log-probabilities and, where the method needs them, hidden states.
        seed: of rules that sample.
        plan: add `plan`, the m x n transport plan, for rules that have one. It is the unscaled plan: its marginals
            times 1 / `metrics["weights/transport_mass"]` are the weights.

    Returns:
        Dictionaries with `row, prompt_ids, chosen_ids, rejected_ids, chosen_weights, rejected_weights, metrics`; the
        weights are those of the completion tokens, padding left out.
    """
    weights = token_weights(spec, pair, seed=seed)
    plans = None
    if plan and spec.method.weights == "otpo":
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
            **_of_pair(weights, index, m, n),
        }
        if plans is not None:
            row["plan"] = plans[index, :m, :n].tolist()
        rows.append(row)
    return rows


def explain_grid(
    spec: MethodSpec, pair: PairLogProbs, *, regs: Sequence[float] = REGS, reg_ms: Sequence[float] = REG_MS
) -> list[list[dict[str, Any]]]:
    """What the pairs' tokens would weigh at other `reg` and `reg_m`, from the same hidden states.

    Args:
        spec: a method whose weights are those of transport; its own `reg` and `reg_m` are added to the values.
        pair: B pairs with hidden states.

    Returns:
        For each pair the cells, `reg` outermost and both ascending: `reg, reg_m`, `asked` (whether these are the
        method's own), `chosen_weights`, `rejected_weights`, `metrics` as in `explain_pairs`, and `plan`, averaged over
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
                found.append(cell | _of_pair(weights, index, m, n) | {"plan": coarse.tolist()})
    return cells


def _of_pair(weights: TokenWeights, index: int, m: int, n: int) -> dict[str, Any]:
    return {
        "chosen_weights": weights.chosen[index, :m].tolist(),
        "rejected_weights": weights.rejected[index, :n].tolist(),
        "metrics": {name: float(values[index]) for name, values in weights.metrics.items()},
    }
