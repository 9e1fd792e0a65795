"""What the value of a hyperparameter may be. A hyperparameter's name means one thing in the whole table of methods."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from otpo.errors import UserError

Value = float | int | str | bool


@dataclass(frozen=True)
class Range:
    """Allowed values of a number; a bound that is not `included` must not be reached."""

    low: float = -math.inf
    high: float = math.inf
    low_included: bool = False
    high_included: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` lies within the bounds."""
        above = value >= self.low if self.low_included else value > self.low
        below = value <= self.high if self.high_included else value < self.high
        return above and below

    def __str__(self) -> str:
        bounds = []
        if self.low > -math.inf:
            bounds.append(f"{'at least' if self.low_included else 'above'} {self.low:g}")
        if self.high < math.inf:
            bounds.append(f"{'at most' if self.high_included else 'below'} {self.high:g}")
        return " ".join(["a number", " and ".join(bounds)]).strip()


_POSITIVE = Range(low=0)
_NOT_NEGATIVE = Range(low=0, low_included=True)


RANGES: dict[str, Range | tuple[str, ...]] = {
    "beta": _POSITIVE,
    "label_smoothing": Range(low=0, high=0.5, low_included=True),
    "sft_weight": _NOT_NEGATIVE,
    "desirable_weight": _NOT_NEGATIVE,
    "undesirable_weight": _NOT_NEGATIVE,
    "gamma_beta_ratio": _NOT_NEGATIVE,
    "cpo_alpha": _NOT_NEGATIVE,
    "orpo_lambda": _NOT_NEGATIVE,
    "center_rewards_coefficient": _NOT_NEGATIVE,
    "alphapo_alpha": Range(),
    "length_alpha": _NOT_NEGATIVE,
    "ld_alpha": Range(low=0, high=1, low_included=True, high_included=True),
    "dpop_lambda": _NOT_NEGATIVE,
    "exo_epsilon": Range(low=0, high=0.5),
    "tdpo_alpha": _NOT_NEGATIVE,
    "tgdpo_alpha": _NOT_NEGATIVE,
    "transform": ("rank_based", "threshold_and_scale", "binary"),
    "keep_ratio": Range(low=0, high=1, high_included=True),
    "discopop_tau": Range(low=0, high=1, high_included=True),
    "divergence": ("reverse_kl", "forward_kl", "js", "alpha"),
    "divergence_alpha": Range(),
    "reg": _POSITIVE,
    "reg_m": _POSITIVE,
    "cost": ("l2", "sqeuclidean", "cosine"),
    "normalizer": ("official", "valid", "none"),
    "solver": ("batched", "pot"),
    "total": ("shorter", "one"),
    "tolerance": Range(low=0, high=1),
    "iterations": _NOT_NEGATIVE,
    "layer": Range(),
}


def checked(where: str, value: Any, default: Value, allowed: Range | tuple[str, ...] | None) -> Value:
    """A value of the default's type within what is allowed, or a `UserError` that names `where` it stands."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{where}: expected true or false, found {value!r}.")
        return value
    if isinstance(default, str):
        if not isinstance(value, str) or (isinstance(allowed, tuple) and value not in allowed):
            expected = f"one of {', '.join(allowed)}" if isinstance(allowed, tuple) else "text"
            hint = nearest(str(value), allowed) if isinstance(allowed, tuple) else ""
            raise UserError(f"{where}: expected {expected}, found {value!r}{hint}.")
        return value
    try:  # YAML 1.1 reads 1e-2 as text
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or (isinstance(allowed, Range) and not allowed.holds(number)):
        raise UserError(f"{where}: expected {allowed or 'a number'}, found {value!r}.")
    if isinstance(default, int):
        if number != int(number):
            raise UserError(f"{where}: expected a whole number, found {value!r}.")
        return int(number)
    return number


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that is most like a wrong one, or nothing."""
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
