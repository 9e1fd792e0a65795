"""Hyperparameters: what each name means, its default and what it may be. A name means one thing in every method."""

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


@dataclass(frozen=True)
class Hyperparameter:
    """A setting of a loss or a weight rule.

    Attributes:
        name: the key in a recipe and the keyword of the functions that take it.
        default: its type is the type of every value: true or false, text, a whole number or a number.
        allowed: the range of a number, the choices of a text, None for true or false.
        meaning: one line, with the unit where there is one.
    """

    name: str
    default: Value
    allowed: Range | tuple[str, ...] | None
    meaning: str

    @property
    def allowed_text(self) -> str:
        """What a value may be, as errors and help print it."""
        if isinstance(self.default, bool):
            return "true or false"
        if isinstance(self.allowed, tuple):
            return f"one of {', '.join(self.allowed)}"
        text = str(self.allowed or Range())
        return text.replace("a number", "a whole number") if isinstance(self.default, int) else text

    def checked(self, where: str, value: Any) -> Value:
        """`value` as the default's type.

        Raises:
            UserError: another type, or a value that is not allowed; the message begins with `where` it was written.
        """
        converted = self._converted(value)
        if converted is None:
            hint = nearest(str(value), self.allowed) if isinstance(self.allowed, tuple) else ""
            raise UserError(f"{where}: expected {self.allowed_text}, found {value!r}{hint}.")
        return converted

    def _converted(self, value: Any) -> Value | None:
        """`value` as the default's type, or None if it is not allowed."""
        if isinstance(self.default, bool):
            return value if isinstance(value, bool) else None
        if isinstance(self.allowed, tuple):
            return value if isinstance(value, str) and value in self.allowed else None
        try:  # YAML 1.1 reads 1e-2 as text
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            return None
        if not math.isfinite(number) or (self.allowed and not self.allowed.holds(number)):
            return None
        if isinstance(self.default, int):
            return int(number) if number.is_integer() else None
        return number


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that is most like a wrong one, or nothing."""
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


_POSITIVE = Range(low=0)
_NOT_NEGATIVE = Range(low=0, low_included=True)
_FRACTION = Range(low=0, high=1, high_included=True)

# ---- of losses ----

BETA = Hyperparameter(
    "beta", 0.1, _POSITIVE,
    "scale of the rewards: beta times the log-ratio to the reference, or times the log-probability where the loss has"
    " no reference; larger keeps the policy closer to the reference",
)  # fmt: skip
LABEL_SMOOTHING = Hyperparameter(
    "label_smoothing",
    0.0,
    Range(low=0, high=0.5, low_included=True),
    "fraction of pairs assumed to be mislabelled",
)
LENGTH_ALPHA = Hyperparameter(
    "length_alpha", 0.01, _NOT_NEGATIVE, "added to the margin for each token by which the chosen completion is longer"
)
DPOP_LAMBDA = Hyperparameter(
    "dpop_lambda", 50.0, _NOT_NEGATIVE,
    "penalty for each nat by which the chosen completion is less likely than under the reference",
)  # fmt: skip
EXO_EPSILON = Hyperparameter(
    "exo_epsilon", 1e-3, Range(low=0, high=0.5), "probability that the target gives to the rejected completion"
)
TDPO_ALPHA = Hyperparameter(
    "tdpo_alpha",
    0.5,
    _NOT_NEGATIVE,
    "weight of the difference between the two completions' KL divergences from the reference",
)
DISCOPOP_TAU = Hyperparameter(
    "discopop_tau", 0.05, _FRACTION, "temperature of the switch between logistic and exponential loss"
)
DIVERGENCE = Hyperparameter(
    "divergence", "js", ("reverse_kl", "forward_kl", "js", "alpha"),
    "divergence from the reference that training limits; js is Jensen-Shannon",
)  # fmt: skip
DIVERGENCE_ALPHA = Hyperparameter(
    "divergence_alpha", 0.5, Range(), "order of `divergence: alpha`; 1 is the limit reverse_kl"
)
GAMMA_BETA_RATIO = Hyperparameter(
    "gamma_beta_ratio", 0.25, _NOT_NEGATIVE,
    "target margin divided by beta, in nats per token: the lead that the chosen completion should have",
)  # fmt: skip
ALPHAPO_ALPHA = Hyperparameter(
    "alphapo_alpha", 0.25, Range(), "curvature of the reward (1 - exp(-alpha s)) / alpha; 0 is SimPO's s"
)
CPO_ALPHA = Hyperparameter(
    "cpo_alpha", 1.0, _NOT_NEGATIVE,
    "weight of the chosen completion's negative log-likelihood (mean nats per token) in the loss",
)  # fmt: skip
ORPO_LAMBDA = Hyperparameter(
    "orpo_lambda", 0.1, _NOT_NEGATIVE, "weight of the odds-ratio term; the chosen completion's likelihood has weight 1"
)
DESIRABLE_WEIGHT = Hyperparameter(
    "desirable_weight", 1.0, _NOT_NEGATIVE, "weight of desirable completions in the loss (lambda_D)"
)
UNDESIRABLE_WEIGHT = Hyperparameter(
    "undesirable_weight", 1.0, _NOT_NEGATIVE, "weight of undesirable completions in the loss (lambda_U)"
)
CENTER_REWARDS_COEFFICIENT = Hyperparameter(
    "center_rewards_coefficient", 0.0, _NOT_NEGATIVE,
    "weight of the squared sum of a pair's scores in the loss, which pulls scores towards mean 0",
)  # fmt: skip

# ---- of weight rules ----

LD_ALPHA = Hyperparameter(
    "ld_alpha", 0.5, Range(low=0, high=1, low_included=True, high_included=True),
    "weight of the tokens beyond the shorter completion's length; 1 weights all tokens alike",
)  # fmt: skip
EXPECTED = Hyperparameter(
    "expected", False, None, "take the expected weights, min(m, n) / length, instead of sampling tokens"
)
REG = Hyperparameter(
    "reg",
    0.1,
    _POSITIVE,
    "entropic regularisation of the transport plan, in units of the cost; larger makes weights more even",
)
REG_M = Hyperparameter(
    "reg_m", 0.2, _POSITIVE, "penalty on the plan's marginals, in units of the cost; larger makes weights more even"
)
COST = Hyperparameter("cost", "l2", ("l2", "sqeuclidean", "cosine"), "distance between the hidden states of two tokens")
NORMALIZER = Hyperparameter(
    "normalizer", "official", ("official", "valid", "none"),
    "what a pair's costs are divided by: the official code's maximum, the completion tokens' maximum, or nothing",
)  # fmt: skip
SOLVER = Hyperparameter(
    "solver", "batched", ("batched", "pot"), "batched Sinkhorn on the model's device, or POT pair by pair on the CPU"
)
ITERATIONS = Hyperparameter("iterations", 0, _NOT_NEGATIVE, "Sinkhorn iterations; 0 takes as many as `tolerance` needs")
TOLERANCE = Hyperparameter(
    "tolerance", 1e-9, Range(low=0, high=1), "factor by which the solver's initial error must shrink"
)
LAYER = Hyperparameter(
    "layer", -1, Range(), "whose hidden states are compared, as an index into `hidden_states`; -1 is the last"
)
TOTAL = Hyperparameter(
    "total", "shorter", ("shorter", "one"),
    "what a side's weights sum to: the shorter completion's length, or one (for losses of means over tokens)",
)  # fmt: skip
KEEP_RATIO = Hyperparameter("keep_ratio", 1.0, _FRACTION, "fraction of a completion's tokens that are selected")
TGDPO_ALPHA = Hyperparameter(
    "tgdpo_alpha", 0.5, _NOT_NEGATIVE, "how strongly the oracle's token rewards change the weights; 0 is DPO"
)
TRANSFORM = Hyperparameter(
    "transform", "rank_based", ("rank_based", "threshold_and_scale", "binary"), "how scores of tokens become weights"
)

# ---- of every method ----

SFT_WEIGHT = Hyperparameter(
    "sft_weight", 0.0, _NOT_NEGATIVE,
    "weight of the chosen (or desirable) completion's negative log-likelihood, mean nats per token, in the loss",
)  # fmt: skip
SWAP_ANSWERS = Hyperparameter(
    "swap_answers", False, None, "prefer the rejected completions; trains TIS-DPO's negative model"
)
