"""What a row of the registry is: a method combines a loss with a weight rule.

Nothing here loads torch: a row holds the paths of its functions and imports them when they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, Literal

from otpo.methods.registry.hyperparameters import Hyperparameter, Value

Objective = Literal["pair", "unpaired", "reward"]
"""What a loss compares: the two completions of a pair, single labelled completions, or a reward model's two scores."""

FROZEN_MODELS = {
    "oracle": "a frozen model, usually trained by DPO: its log-ratio to the reference is a token's reward",
    "positive": "a frozen model that prefers the chosen completions, usually trained by DPO",
    "negative": "a frozen model that prefers the rejected ones, usually trained by DPO with `swap_answers: true`",
}
"""Frozen models that a recipe names: another label of its methods, which is trained first, or a model folder."""

NEEDS = FROZEN_MODELS | {
    "reference": "log-probabilities of the reference, the frozen model that training starts from",
    "hidden": "hidden states of the policy",
    "log_sum_squares": "log sum_v pi_v^2 over the policy's vocabulary",
    "reference_kl": "KL(reference | policy) over the vocabulary, which needs the reference in memory during training",
}
"""What a loss or a weight rule may read in addition to the policy's log-probabilities of the completion's tokens."""

REFERENCE = frozenset({"reference"})


def _imported(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class Loss:
    """A loss, and how it is called.

    Attributes:
        path: "module:function" in `otpo.methods.losses`; the function's name is the loss's.
        hyperparameters: the function's keywords, in the order in which they are shown.
        needs: names in `NEEDS`.
        objective: what it compares.
        collects: for a loss that depends on the whole global batch, "module:function" in `otpo.methods.losses` of the
            function that gives its (B, 2) values of B pairs or completions. The step collects the values of the global
            batch and passes them to the loss as `global_values`.
    """

    path: str
    hyperparameters: tuple[Hyperparameter, ...]
    needs: frozenset[str] = frozenset()
    objective: Objective = "pair"
    collects: str | None = None

    @property
    def name(self) -> str:
        """The function's name."""
        return self.path.partition(":")[2]

    @property
    def function(self) -> Callable[..., Any]:
        """The loss itself; imports torch."""
        return _imported(f"otpo.methods.losses.{self.path}")

    @property
    def collect(self) -> Callable[..., Any] | None:
        """The function that `collects` names, or None; imports torch."""
        return _imported(f"otpo.methods.losses.{self.collects}") if self.collects else None


@dataclass(frozen=True)
class WeightRule:
    """A rule for the weights of a pair's tokens. A recipe may combine any rule with any loss of pairs.

    Attributes:
        path: "module:function" in `otpo.methods.weights`; the function's name is the rule's.
        hyperparameters, needs: as in `Loss`.
    """

    path: str
    hyperparameters: tuple[Hyperparameter, ...] = ()
    needs: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The function's name, which a recipe's `weights` says."""
        return self.path.partition(":")[2]

    @property
    def function(self) -> Callable[..., Any]:
        """The rule itself; imports torch."""
        return _imported(f"otpo.methods.weights.{self.path}")


@dataclass(frozen=True)
class Method:
    """A method: one row of the registry.

    Attributes:
        name: as a recipe writes it. title: as a page prints it.
        loss: what is minimised. weight_rule: how much each token counts in it; only losses of pairs read weights.
        overrides: defaults of this method that differ from the hyperparameters' own: the official code's values, else
            TRL's.
        paper: address. note: what a reader should know before comparing it.
        means: whether its weights sum to 1, so that the loss is of means over tokens, not of sums.
    """

    name: str
    title: str
    loss: Loss
    weight_rule: WeightRule
    overrides: Mapping[str, Value] = field(default_factory=dict)
    paper: str = field(kw_only=True)
    note: str = field(default="", kw_only=True)
    means: bool = field(default=False, kw_only=True)

    @property
    def objective(self) -> Objective:
        """What its loss compares."""
        return self.loss.objective

    @property
    def hyperparameters(self) -> dict[str, Hyperparameter]:
        """Those of the loss, then those of the weight rule, with this method's defaults."""
        of_loss, of_rule = self.loss.hyperparameters, self.weight_rule.hyperparameters
        overrides = {"total": "one", **self.overrides} if self.means else self.overrides
        # the loss's come first, and its default counts where both have one (beta)
        declared = {each.name: each for each in (*of_loss, *of_rule, *of_loss)}
        return {name: replace(each, default=overrides.get(name, each.default)) for name, each in declared.items()}

    @property
    def defaults(self) -> dict[str, Value]:
        """The default of every hyperparameter of the loss and of the weight rule."""
        return {name: each.default for name, each in self.hyperparameters.items()}

    @property
    def needs(self) -> frozenset[str]:
        """What the record of log-probabilities must hold: names in `NEEDS`."""
        return self.loss.needs | self.weight_rule.needs

    def weighted_by(self, rule: WeightRule) -> Method:
        """The same loss of pairs with the tokens weighted by another rule."""
        if rule == self.weight_rule:
            return self
        own = {each.name for each in self.loss.hyperparameters}
        return replace(
            self,
            title=f"{self.title}, tokens weighted by `{rule.name}`",
            weight_rule=rule,
            overrides={name: value for name, value in self.overrides.items() if name in own},
        )
