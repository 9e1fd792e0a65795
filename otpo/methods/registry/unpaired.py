"""Methods of single completions, each labelled desirable or not. Their losses are in `losses.unpaired`."""

from __future__ import annotations

from otpo.methods.registry.hyperparameters import BETA, DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT
from otpo.methods.registry.rows import REFERENCE, Loss, Method
from otpo.methods.registry.weight_rules import UNIFORM

# fmt: off
METHODS = [
    Method(
        "kto", "KTO",
        Loss(
            "unpaired:kto", (BETA, DESIRABLE_WEIGHT, UNDESIRABLE_WEIGHT), REFERENCE,
            objective="unpaired", collects="unpaired:kto_values",
        ),
        UNIFORM,
        paper="https://arxiv.org/abs/2402.01306",
        note="Takes `{prompt, completion, label}` rows, or splits pairs into two completions each as TRL does; batches "
        "and epochs count completions. Keep desirable_weight n_D / (undesirable_weight n_U) between 1 and 4/3. The KL "
        "term is of the global batch; its mismatched completions take a second forward pass.",
    ),
]
# fmt: on
