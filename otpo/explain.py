"""What each token of a pair weighs, and why: the data behind `otpo weights`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from otpo.methods import MethodSpec
from otpo.records import PairLogProbs, TokenPair
from otpo.weights import token_weights, transport_log_plan


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
            "chosen_weights": weights.chosen[index, :m].tolist(),
            "rejected_weights": weights.rejected[index, :n].tolist(),
            "metrics": {name: float(values[index]) for name, values in weights.metrics.items()},
        }
        if plans is not None:
            row["plan"] = plans[index, :m, :n].tolist()
        rows.append(row)
    return rows
