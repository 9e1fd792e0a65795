"""Turns a label of a recipe into a method with its hyperparameters, without loading torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from otpo.errors import UserError
from otpo.methods.iterations import check_iterations, check_pot
from otpo.methods.registry import METHODS, SHARED
from otpo.methods.registry.hyperparameters import Value, nearest
from otpo.methods.registry.rows import FROZEN_MODELS, Method
from otpo.methods.registry.weight_rules import WEIGHT_RULES


@dataclass(frozen=True)
class MethodSpec:
    """A method under a recipe's label, with every hyperparameter filled in and checked.

    Attributes:
        method: the registry's row, with the rule that the recipe's `weights` named in place of its own.
        frozen_models: frozen model that the method needs ("oracle", ...) -> label of the recipe, or model folder.
    """

    label: str
    method: Method
    hyperparameters: dict[str, Value]
    frozen_models: dict[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Value]:
        """The settings from which `resolve` makes this spec again, under any label."""
        rule = self.method.weight_rule
        named = {} if rule == METHODS[self.method.name].weight_rule else {"weights": rule.name}
        return {"method": self.method.name, **named, **self.hyperparameters, **self.frozen_models}

    @property
    def layer(self) -> int:
        """The layer whose hidden states the weight rule reads, as an index into transformers' `hidden_states`."""
        return int(self.hyperparameters.get("layer", -1))

    def arguments(self, function: Callable) -> dict[str, Any]:
        """The hyperparameters that `function` (the method's loss or its weight rule) takes."""
        taken = inspect.signature(function).parameters
        return {name: value for name, value in self.hyperparameters.items() if name in taken}


def resolve(label: str, settings: Mapping[str, Any] | None) -> MethodSpec:
    """The method that `label` of a recipe's `methods` section stands for.

    Args:
        label: a method's name, or any name if `settings` has the key `method`.
        settings: hyperparameters; each that is left out takes the method's default. `weights` names a rule that
            weights the tokens in place of the method's own; the method then takes that rule's hyperparameters. Keys
            that override `train` must be removed before.

    Raises:
        UserError: an unknown method, rule or hyperparameter (the nearest known name is given), a wrong type, a value
            that is not allowed, a frozen model that is needed and not named, or a solver that would run for hours
            or cannot solve it.
    """
    given = dict(settings or {})
    name = given.pop("method", label)
    if not isinstance(name, str) or name not in METHODS:
        raise UserError(
            f"methods.{label}: expected a method's name, found {name!r}{nearest(str(name), METHODS)}. "
            f"Known methods: {', '.join(METHODS)}. A label of your own needs `method: NAME`."
        )
    method = METHODS[name]
    if "weights" in given:
        method = _weighted(label, method, given.pop("weights"))
    declared = method.hyperparameters | SHARED
    hyperparameters = {name: each.default for name, each in declared.items()}
    frozen_models = {name: given.pop(name, None) for name in FROZEN_MODELS if name in method.needs}
    for name, model in frozen_models.items():
        if not isinstance(model, str) or not model:
            raise UserError(
                f"methods.{label}.{name}: {method.title} needs the log-probabilities of a frozen model: expected"
                f" another label of `methods` (it is trained first) or a model folder, found {model!r}. {method.note}"
            )
    for key, value in given.items():
        if key not in declared:
            takes = [*frozen_models, *declared, *(["weights"] if method.objective == "pair" else [])]
            raise UserError(
                f"methods.{label}.{key}: {method.title} has no such hyperparameter{nearest(key, declared)}. "
                f"It takes: {', '.join(takes)}."
            )
        hyperparameters[key] = declared[key].checked(f"methods.{label}.{key}", value)
    if method.objective == "reward" and hyperparameters["sft_weight"]:
        raise UserError(f"methods.{label}.sft_weight: {method.title} has no likelihood to add: leave it out.")
    check_iterations(label, hyperparameters)
    check_pot(label, hyperparameters)
    return MethodSpec(label, method, hyperparameters, frozen_models)


def _weighted(label: str, method: Method, rule: Any) -> Method:
    """The method with its tokens weighted by the rule that a recipe's `weights` names."""
    if rule == method.weight_rule.name:
        return method
    if method.objective != "pair":
        raise UserError(f"methods.{label}.weights: {method.title} reads no token weights of pairs: leave it out.")
    if not isinstance(rule, str) or rule not in WEIGHT_RULES:
        raise UserError(
            f"methods.{label}.weights: expected one of {', '.join(WEIGHT_RULES)}, found {rule!r}"
            f"{nearest(str(rule), WEIGHT_RULES)}."
        )
    return method.weighted_by(WEIGHT_RULES[rule])
