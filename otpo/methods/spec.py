"""A recipe's label becomes a method with its hyperparameters.

Without torch: a recipe is checked on machines that have none.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from otpo.errors import UserError
from otpo.methods.hyperparameters import RANGES, Value, checked, nearest
from otpo.methods.registry import FROZEN_MODELS, METHODS, SHARED, WEIGHTS, Method

__all__ = ["FROZEN_MODELS", "METHODS", "RANGES", "SHARED", "WEIGHTS", "Method", "MethodSpec", "resolve"]


@dataclass(frozen=True)
class MethodSpec:
    """A method under a recipe's label, with all hyperparameters filled in and checked.

    Attributes:
        method: the row of the table, with the rule that the recipe's `weights` named in place of its own.
        frozen_models: frozen model that the method needs ("oracle", ...) -> label of the recipe, or model folder.
    """

    label: str
    method: Method
    hyperparameters: dict[str, Value]
    frozen_models: dict[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Value]:
        """What `resolve` makes this again of, under any label."""
        rule = self.method.weights
        named = {} if rule == METHODS[self.method.name].weights else {"weights": rule}
        return {"method": self.method.name, **named, **self.hyperparameters, **self.frozen_models}

    @property
    def layer(self) -> int:
        """Whose hidden states the weight rule reads, as an index into transformers' `hidden_states`."""
        return int(self.hyperparameters.get("layer", -1))

    def arguments(self, function: Callable) -> dict[str, Any]:
        """Those hyperparameters that `function` (the method's loss or its weight rule) takes."""
        taken = inspect.signature(function).parameters
        return {name: value for name, value in self.hyperparameters.items() if name in taken}


def resolve(label: str, settings: Mapping[str, Any] | None) -> MethodSpec:
    """The method that `label` of a recipe's `methods` section stands for.

    Args:
        label: a method's name, or any name if `settings` has the key `method`.
        settings: hyperparameters; what is left out takes the method's default. `weights` names a rule that weighs the
            tokens instead of the method's own; then it takes that rule's hyperparameters. Keys that override `train`
            must have been split off before.

    Raises:
        UserError: an unknown method, rule or hyperparameter (the nearest known name is given), a wrong type, a value
            out of range, or a frozen model that is needed and not named.
    """
    given = dict(settings or {})
    name = given.pop("method", label)
    if not isinstance(name, str) or name not in METHODS:
        raise UserError(
            f"methods.{label}: expected a method's name, found {name!r}{nearest(str(name), METHODS)}. "
            f"Known methods: {', '.join(METHODS)}. A label of your own needs `method: NAME`."
        )
    method = _weighted(label, METHODS[name], given.pop("weights", METHODS[name].weights))
    defaults = method.defaults | SHARED
    hyperparameters = dict(defaults)
    frozen_models = {name: given.pop(name, None) for name in FROZEN_MODELS if name in method.needs}
    for name, scorer in frozen_models.items():
        if not isinstance(scorer, str) or not scorer:
            raise UserError(
                f"methods.{label}.{name}: {method.title} needs the log-probabilities of a frozen model: expected"
                f" another label of `methods` (it is trained first) or a model folder, found {scorer!r}. {method.note}"
            )
    for key, value in given.items():
        if key not in defaults:
            raise UserError(
                f"methods.{label}.{key}: {method.title} has no such hyperparameter{nearest(key, defaults)}. "
                f"It takes: {', '.join([*frozen_models, *defaults, *(['weights'] if method.weighs else [])])}."
            )
        hyperparameters[key] = checked(f"methods.{label}.{key}", value, defaults[key], RANGES.get(key))
    if "reward_head" in method.needs and hyperparameters["sft_weight"]:
        raise UserError(f"methods.{label}.sft_weight: {method.title} has no likelihood to add: leave it out.")
    return MethodSpec(label, method, hyperparameters, frozen_models)


def _weighted(label: str, method: Method, rule: Any) -> Method:
    """A method whose tokens are weighted by a rule, its own or another."""
    if rule == method.weights:
        return method
    if not method.weighs:
        raise UserError(f"methods.{label}.weights: {method.title} weighs no tokens of pairs: leave it out.")
    if not isinstance(rule, str) or rule not in WEIGHTS:
        raise UserError(
            f"methods.{label}.weights: expected one of {', '.join(WEIGHTS)}, found {rule!r}"
            f"{nearest(str(rule), WEIGHTS)}."
        )
    return replace(method, title=f"{method.title}, tokens weighted by `{rule}`", weights=rule)
