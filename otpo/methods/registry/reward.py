"""Reward models: a scalar head instead of the vocabulary's, which scores and generates nothing."""

from __future__ import annotations

from otpo.methods.registry.hyperparameters import CENTER_REWARDS_COEFFICIENT
from otpo.methods.registry.rows import Loss, Method
from otpo.methods.registry.weight_rules import UNIFORM

# fmt: off
METHODS = [
    Method(
        "reward-model", "Reward model",
        Loss("reward:bradley_terry", (CENTER_REWARDS_COEFFICIENT,), objective="reward"), UNIFORM,
        paper="https://arxiv.org/abs/2203.02155",
        note="Scores outputs (`judge.reward_model`, `pairs.scorer.reward_model`) and generates none. A column `margin` "
        "says by how much the chosen completion is better. TRL's learning rate is 1e-4; 0.01 is the usual coefficient.",
    ),
]
# fmt: on
