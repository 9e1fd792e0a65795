"""Methods: a loss times a rule for the weights of tokens. Importing this loads no torch."""

from otpo.methods.registry import LOSSES, METHODS, SHARED
from otpo.methods.registry.hyperparameters import Hyperparameter, Range, Value, nearest
from otpo.methods.registry.rows import FROZEN_MODELS, NEEDS, Loss, Method, Objective, WeightRule
from otpo.methods.registry.weight_rules import WEIGHT_RULES
from otpo.methods.spec import MethodSpec, resolve

__all__ = [
    "FROZEN_MODELS",
    "LOSSES",
    "METHODS",
    "NEEDS",
    "SHARED",
    "WEIGHT_RULES",
    "Hyperparameter",
    "Loss",
    "Method",
    "MethodSpec",
    "Objective",
    "Range",
    "Value",
    "WeightRule",
    "nearest",
    "resolve",
]
