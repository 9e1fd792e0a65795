"""The table of methods: plain data, readable without torch.

A method is a weight rule (`otpo.weights.RULES`) times a loss (`otpo.losses.LOSSES`), both found by name. Adding one is
a row of `METHODS`; a hyperparameter's name means one thing in the whole table, and `RANGES` says what it may be.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from otpo.errors import UserError

Value = float | int | str | bool


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: as a recipe writes it. title: as a page prints it.
        loss: a name in `otpo.losses.LOSSES`. weights: a name in `otpo.weights.RULES`.
        needs: what the record of log-probabilities must hold: "reference" (the frozen start's log-probabilities),
            "hidden" (the policy's hidden states).
        defaults: every hyperparameter of the loss and the weight rule, with the official code's value.
        paper: address. note: what a reader should know before comparing it.
    """

    name: str
    title: str
    loss: str
    weights: str
    needs: frozenset[str]
    defaults: dict[str, Value]
    paper: str
    note: str = ""


@dataclass(frozen=True)
class MethodSpec:
    """A method under a recipe's label, with all hyperparameters filled in and checked."""

    label: str
    method: Method
    hyperparameters: dict[str, Value]

    def arguments(self, function: Callable) -> dict[str, Any]:
        """Those hyperparameters that `function` (the method's loss or its weight rule) takes."""
        taken = inspect.signature(function).parameters
        return {name: value for name, value in self.hyperparameters.items() if name in taken}


def _table(*rows: Method) -> dict[str, Method]:
    return {row.name: row for row in rows}


_REFERENCE = frozenset({"reference"})

METHODS: dict[str, Method] = _table(
    Method(
        name="dpo",
        title="DPO",
        loss="sigmoid",
        weights="uniform",
        needs=_REFERENCE,
        defaults={"beta": 0.1, "label_smoothing": 0.0},
        paper="https://arxiv.org/abs/2305.18290",
        note="Sums over tokens, so longer answers move the margin more. SimPO's tuned DPO baseline uses beta 0.01.",
    ),
    Method(
        name="sampo",
        title="SamPO",
        loss="sigmoid",
        weights="sampo",
        needs=_REFERENCE,
        defaults={"beta": 0.1, "label_smoothing": 0.0, "expected": False},
        paper="https://arxiv.org/abs/2406.10957",
        note="Policy and reference share the sampled tokens (the official code draws twice). `expected: true` takes "
        "the expectation of the weights, min(m, n) / length: length-matched DPO without sampling noise.",
    ),
    Method(
        name="otpo",
        title="OTPO",
        loss="sigmoid",
        weights="otpo",
        needs=_REFERENCE | {"hidden"},
        defaults={
            "beta": 0.1,
            "label_smoothing": 0.0,
            "reg": 0.1,
            "reg_m": 0.2,
            "cost": "l2",
            "normalizer": "official",
            "solver": "batched",
        },
        paper="https://aclanthology.org/2025.acl-long.1035",
        note="Defaults are the paper's Llama-3.2-3B setting (beta 0.1, reg 0.1, reg_m 0.2). The 8B setting is beta "
        "0.01, reg 1, where the weights are almost even: close to `sampo` with `expected: true`. Weights sum to "
        "min(m, n), so margins are smaller than DPO's at equal beta: tune beta and the learning rate for each.",
    ),
    Method(
        name="cdpo",
        title="cDPO",
        loss="sigmoid",
        weights="uniform",
        needs=_REFERENCE,
        defaults={"beta": 0.1, "label_smoothing": 0.2},
        paper="https://ericmitchell.ai/cdpo.pdf",
        note="DPO that takes a share `label_smoothing` of the labels for flipped. Default of HALOs.",
    ),
    Method(
        name="robust-dpo",
        title="Robust DPO",
        loss="robust",
        weights="uniform",
        needs=_REFERENCE,
        defaults={"beta": 0.1, "label_smoothing": 0.1},
        paper="https://arxiv.org/abs/2403.00409",
        note="TRL's `robust`.",
    ),
    Method(
        name="hinge",
        title="SLiC (hinge)",
        loss="hinge",
        weights="uniform",
        needs=_REFERENCE,
        defaults={"beta": 0.1},
        paper="https://arxiv.org/abs/2305.10425",
        note="SLiC's loss on DPO's margin, as TRL's `hinge`.",
    ),
    Method(
        name="ipo",
        title="IPO",
        loss="ipo",
        weights="mean",
        needs=_REFERENCE,
        defaults={"beta": 0.1},
        paper="https://arxiv.org/abs/2310.12036",
        note="Averaged over tokens, as its authors confirmed to TRL; `beta` is the paper's tau. `ipo-sum` sums.",
    ),
    Method(
        name="ipo-sum",
        title="IPO (summed)",
        loss="ipo",
        weights="uniform",
        needs=_REFERENCE,
        defaults={"beta": 0.1},
        paper="https://arxiv.org/abs/2310.12036",
        note="Summed over tokens, as in the DPO repository and OpenRLHF.",
    ),
    Method(
        name="dpo-norm",
        title="Length-normalised DPO",
        loss="sigmoid",
        weights="mean",
        needs=_REFERENCE,
        defaults={"beta": 5.0, "label_smoothing": 0.0},
        paper="https://arxiv.org/abs/2411.15124",
        note="Tulu 3's DPO and beta; TRL's `sigmoid_norm`. Margins are means over tokens, hence the large beta.",
    ),
    Method(
        name="ld-dpo",
        title="LD-DPO",
        loss="sigmoid",
        weights="ld",
        needs=_REFERENCE,
        defaults={"beta": 0.1, "label_smoothing": 0.0, "ld_alpha": 0.5},
        paper="https://arxiv.org/abs/2409.06411",
        note="Tokens beyond the shorter answer's length weigh `ld_alpha`, in policy and reference; 1 is DPO.",
    ),
    Method(
        name="r-dpo",
        title="R-DPO",
        loss="length_regularized",
        weights="uniform",
        needs=_REFERENCE,
        defaults={"beta": 0.1, "length_alpha": 0.01},
        paper="https://arxiv.org/abs/2403.19159",
        note="`length_alpha` counts per token of difference in length; 0 is DPO.",
    ),
    Method(
        name="simpo",
        title="SimPO",
        loss="simpo",
        weights="mean",
        needs=frozenset(),
        defaults={"beta": 2.0, "gamma_beta_ratio": 0.25, "label_smoothing": 0.0},
        paper="https://arxiv.org/abs/2405.14734",
        note="Defaults of the official code; released models use beta 2 to 10 and gamma/beta 0.1 to 0.8, each tuned.",
    ),
    Method(
        name="cpo",
        title="CPO",
        loss="cpo",
        weights="uniform",
        needs=frozenset(),
        defaults={"beta": 0.1, "cpo_alpha": 1.0, "label_smoothing": 0.0},
        paper="https://arxiv.org/abs/2401.08417",
        note="`cpo_alpha` weighs the likelihood of the chosen answer.",
    ),
)


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
        return "a number " + " and ".join(bounds)


_POSITIVE = Range(low=0)
_NOT_NEGATIVE = Range(low=0, low_included=True)

RANGES: dict[str, Range | tuple[str, ...]] = {
    "beta": _POSITIVE,
    "label_smoothing": Range(low=0, high=0.5, low_included=True),
    "gamma_beta_ratio": _NOT_NEGATIVE,
    "cpo_alpha": _NOT_NEGATIVE,
    "length_alpha": _NOT_NEGATIVE,
    "ld_alpha": Range(low=0, high=1, low_included=True, high_included=True),
    "reg": _POSITIVE,
    "reg_m": _POSITIVE,
    "cost": ("l2", "sqeuclidean", "cosine"),
    "normalizer": ("official", "valid", "none"),
    "solver": ("batched", "pot"),
}


def resolve(label: str, settings: Mapping[str, Any] | None) -> MethodSpec:
    """The method that `label` of a recipe's `methods` section stands for.

    Args:
        label: a method's name, or any name if `settings` has the key `method`.
        settings: hyperparameters; what is left out takes the method's default. Keys that override `train` must have
            been split off before.

    Raises:
        UserError: an unknown method or hyperparameter (the nearest known name is given), a wrong type, or a value out
            of range.
    """
    given = dict(settings or {})
    name = given.pop("method", label)
    if not isinstance(name, str) or name not in METHODS:
        raise UserError(
            f"methods.{label}: expected a method's name, found {name!r}{_nearest(str(name), METHODS)}. "
            f"Known methods: {', '.join(METHODS)}. A label of your own needs `method: NAME`."
        )
    method = METHODS[name]
    hyperparameters = dict(method.defaults)
    for key, value in given.items():
        if key not in method.defaults:
            raise UserError(
                f"methods.{label}.{key}: {method.title} has no such hyperparameter{_nearest(key, method.defaults)}. "
                f"It takes: {', '.join(method.defaults)}."
            )
        hyperparameters[key] = _checked(f"methods.{label}.{key}", value, method.defaults[key], RANGES.get(key))
    return MethodSpec(label, method, hyperparameters)


def _checked(where: str, value: Any, default: Value, allowed: Range | tuple[str, ...] | None) -> Value:
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{where}: expected true or false, found {value!r}.")
        return value
    if isinstance(default, str):
        if not isinstance(value, str) or (isinstance(allowed, tuple) and value not in allowed):
            expected = f"one of {', '.join(allowed)}" if isinstance(allowed, tuple) else "text"
            hint = _nearest(str(value), allowed) if isinstance(allowed, tuple) else ""
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


def _nearest(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
