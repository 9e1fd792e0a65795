"""The registry: every method as one row, readable without torch.

To add a method, add a row to the family that its loss belongs to: `pairwise`, `reference_free`, `unpaired` or `reward`.
A new formula is a pure function of the same-named module of `otpo.methods.losses`; a new way to weight tokens is a pure
function in `otpo.methods.weights` and a row of `weight_rules`; a new setting is declared in `hyperparameters`.
"""

from __future__ import annotations

from otpo.methods.registry import pairwise, reference_free, reward, unpaired
from otpo.methods.registry.hyperparameters import SFT_WEIGHT, SWAP_ANSWERS, Hyperparameter
from otpo.methods.registry.rows import Loss, Method

METHODS: dict[str, Method] = {
    row.name: row for row in [*pairwise.METHODS, *reference_free.METHODS, *unpaired.METHODS, *reward.METHODS]
}
"""By the names that a recipe writes."""

LOSSES: dict[str, Loss] = {method.loss.name: method.loss for method in METHODS.values()}
"""By their functions' names."""

SHARED: dict[str, Hyperparameter] = {each.name: each for each in (SFT_WEIGHT, SWAP_ANSWERS)}
"""Hyperparameters that every method takes beside its own."""
