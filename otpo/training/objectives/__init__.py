"""What training can optimise: pairs, labelled completions, a reward model, or plain completions.

Each kind is one object with the methods of `Objective`; `objective_of` chooses it once, and nothing else asks which it
is.
"""

from __future__ import annotations

from collections.abc import Mapping

from otpo.methods.spec import MethodSpec
from otpo.training.objectives.base import CachedLogProbs, FrozenModels, Objective, Start, TrainedModel
from otpo.training.objectives.pair import PairObjective
from otpo.training.objectives.reward import RewardObjective
from otpo.training.objectives.supervised import SupervisedObjective
from otpo.training.objectives.unpaired import UnpairedObjective

__all__ = ["CachedLogProbs", "FrozenModels", "Objective", "Start", "TrainedModel", "objective_of"]


def objective_of(spec: MethodSpec | None, *, seed: int, margins: Mapping[int, float] | None = None) -> Objective:
    """The objective of a method.

    Args:
        spec: None for supervised training.
        seed: for weight rules that sample tokens.
        margins: for a reward model, data row -> by how much its chosen completion is better.
    """
    if spec is None:
        return SupervisedObjective()
    if spec.method.objective == "reward":
        return RewardObjective(spec, margins)
    if spec.method.objective == "unpaired":
        return UnpairedObjective(spec)
    return PairObjective(spec, seed)
