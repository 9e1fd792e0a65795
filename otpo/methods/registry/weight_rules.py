"""The weight rules, each a pure function in `otpo.methods.weights`."""

from __future__ import annotations

from dataclasses import replace

from otpo.methods.registry.hyperparameters import (
    BETA,
    COST,
    EXPECTED,
    ITERATIONS,
    KEEP_RATIO,
    LAYER,
    LD_ALPHA,
    NORMALIZER,
    REG,
    REG_M,
    SOLVER,
    TGDPO_ALPHA,
    TOLERANCE,
    TOTAL,
    TRANSFORM,
)
from otpo.methods.registry.rows import REFERENCE, WeightRule

UNIFORM = WeightRule("length:uniform")
MEAN = WeightRule("length:mean")
LD = WeightRule("length:ld", (LD_ALPHA,))
SAMPO = WeightRule("length:sampo", (EXPECTED,))
OTPO = WeightRule(
    "otpo:otpo", (REG, REG_M, COST, NORMALIZER, SOLVER, ITERATIONS, TOLERANCE, LAYER, TOTAL), frozenset({"hidden"})
)
CONFPO = WeightRule("probability:confpo")
SEPO = WeightRule("probability:sepo", (replace(KEEP_RATIO, default=0.3),), REFERENCE | {"oracle"})
TGDPO = WeightRule("probability:tgdpo", (BETA, TGDPO_ALPHA), REFERENCE | {"oracle"})
TIS = WeightRule("probability:tis", (TRANSFORM, KEEP_RATIO), frozenset({"positive", "negative"}))

WEIGHT_RULES = {rule.name: rule for rule in (UNIFORM, MEAN, LD, SAMPO, OTPO, CONFPO, SEPO, TGDPO, TIS)}
"""By the names that a recipe's `weights` says."""
