"""Methods of pairs whose losses need no reference. Their losses are in `losses.reference_free`."""

from __future__ import annotations

from otpo.methods.registry.hyperparameters import (
    ALPHAPO_ALPHA,
    BETA,
    CPO_ALPHA,
    GAMMA_BETA_RATIO,
    LABEL_SMOOTHING,
    ORPO_LAMBDA,
)
from otpo.methods.registry.rows import Loss, Method
from otpo.methods.registry.weight_rules import CONFPO, MEAN, OTPO, SEPO, UNIFORM

SIMPO = Loss("reference_free:simpo", (BETA, GAMMA_BETA_RATIO, LABEL_SMOOTHING))

# fmt: off
METHODS = [
    Method(
        "simpo", "SimPO", SIMPO, MEAN, {"beta": 2.0}, means=True,
        paper="https://arxiv.org/abs/2405.14734",
        note="Defaults of the official code; released models use beta 2 to 10 and gamma/beta 0.1 to 0.8, each tuned.",
    ),
    Method(
        "otpo-simpo", "OTPO-SimPO", SIMPO, OTPO, {"beta": 2.0}, means=True,
        paper="https://aclanthology.org/2025.acl-long.1035",
        note="SimPO whose mean over tokens is weighted by optimal transport; at large reg it is SimPO.",
    ),
    Method(
        "alphapo", "AlphaPO",
        Loss("reference_free:alphapo", (BETA, GAMMA_BETA_RATIO, LABEL_SMOOTHING, ALPHAPO_ALPHA)), MEAN, {"beta": 2.0},
        means=True,
        paper="https://arxiv.org/abs/2501.03884",
        note="SimPO with another shape of the reward; `alphapo_alpha: 0` is SimPO. No official code: tune alpha.",
    ),
    Method(
        "confpo", "ConfPO",
        Loss("reference_free:simpo_selected", (BETA, GAMMA_BETA_RATIO, LABEL_SMOOTHING)), CONFPO,
        {"beta": 1.5, "gamma_beta_ratio": 1.6 / 1.5}, means=True,
        paper="https://arxiv.org/abs/2506.08712",
        note="SimPO on the tokens that the policy finds less probable than the completion's tokens on average.",
    ),
    Method(
        "sepo", "SePO", SIMPO, SEPO, {"beta": 1.0, "gamma_beta_ratio": 0.0}, means=True,
        paper="https://arxiv.org/abs/2408.13518",
        note="`oracle` is a (small) model trained by DPO. Trains on the best-scored fraction of the chosen "
        "completion's tokens and the worst-scored of the rejected one's; beta and gamma are the official code's.",
    ),
    Method(
        "cpo", "CPO", Loss("reference_free:cpo", (BETA, CPO_ALPHA, LABEL_SMOOTHING)), UNIFORM,
        paper="https://arxiv.org/abs/2401.08417",
        note="`cpo_alpha` weights the likelihood of the chosen completion.",
    ),
    Method(
        "orpo", "ORPO", Loss("reference_free:orpo", (ORPO_LAMBDA,)), MEAN, means=True,
        paper="https://arxiv.org/abs/2403.07691",
        note="The released models' lambda (the official code's default is 1; TRL calls it beta). The likelihood is of "
        "the chosen completion as in LLaMA-Factory; the official code and TRL count the prompt's tokens too.",
    ),
]
# fmt: on
