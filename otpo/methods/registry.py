"""The table of methods: plain data, readable without torch.

A method is a weight rule (`WEIGHTS`, in `otpo.methods.weights`) times a loss (in `otpo.methods.losses`), both found by
name. Adding one is a row of `METHODS`; `otpo.methods.hyperparameters.RANGES` says what its hyperparameters may be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from otpo.methods.hyperparameters import Value

_NOTHING: frozenset[str] = frozenset()
_REFERENCE = frozenset({"reference"})


@dataclass(frozen=True)
class Rule:
    """A weight rule: what it needs beside the policy's log-probabilities (see `Method`), and its hyperparameters."""

    needs: frozenset[str] = _NOTHING
    defaults: Mapping[str, Value] = field(default_factory=dict)


WEIGHTS: dict[str, Rule] = {
    "uniform": Rule(),
    "mean": Rule(),
    "ld": Rule(defaults={"ld_alpha": 0.5}),
    "sampo": Rule(defaults={"expected": False}),
    "otpo": Rule(
        frozenset({"hidden"}),
        {
            "reg": 0.1, "reg_m": 0.2, "cost": "l2", "normalizer": "official", "solver": "batched",
            "iterations": 0, "tolerance": 1e-9, "layer": -1, "total": "shorter",
        },
    ),
    "confpo": Rule(),
    "sepo": Rule(_REFERENCE | {"oracle"}, {"keep_ratio": 0.3}),
    "tgdpo": Rule(_REFERENCE | {"oracle"}, {"beta": 0.1, "tgdpo_alpha": 0.5}),
    "tis": Rule(frozenset({"positive", "negative"}), {"transform": "rank_based", "keep_ratio": 1.0}),
}  # fmt: skip
"""Weight rules by their names in `RULES`. Any of them may stand in for a pair method's own: `weights`."""


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: as a recipe writes it. title: as a page prints it.
        loss: a name in `otpo.methods.losses.LOSSES`. weights: a name in `WEIGHTS`.
        loss_needs: what the loss reads, beside what the weight rule needs; see `needs`.
        loss_defaults: the loss's hyperparameters, with the official code's value, else TRL's.
        paper: address. note: what a reader should know before comparing it.
        of_means: whether the loss is one of means over tokens (weights sum to 1), not of sums.
    """

    name: str
    title: str
    loss: str
    weights: str
    loss_needs: frozenset[str]
    loss_defaults: Mapping[str, Value]
    paper: str
    note: str = ""
    of_means: bool = False

    @property
    def needs(self) -> frozenset[str]:
        """What the record of log-probabilities must hold.

        "reference" (the frozen start's log-probabilities), those of other frozen models (`FROZEN_MODELS`, named in a
        recipe), "hidden" (the policy's hidden states), "log_sum_squares" and "reference_kl" (figures over the whole
        vocabulary; the latter keeps the reference in memory beside the policy). "unpaired": single labelled completions
        instead of pairs; of pairs, each answer. "reward_head": a scalar head instead of the vocabulary's; what is
        trained scores answers and writes none.
        """
        return self.loss_needs | WEIGHTS[self.weights].needs

    @property
    def defaults(self) -> dict[str, Value]:
        """Every hyperparameter of the loss and of the weight rule."""
        of_rule = {**WEIGHTS[self.weights].defaults}
        if self.of_means and "total" in of_rule:
            of_rule["total"] = "one"
        # the loss's come first, and its value counts where both have one (beta)
        return {**self.loss_defaults, **of_rule, **self.loss_defaults}

    @property
    def weighs(self) -> bool:
        """Whether its loss reads token weights, so that `weights` may name another rule."""
        return not self.loss_needs & {"unpaired", "reward_head"}


SHARED: dict[str, Value] = {"sft_weight": 0.0, "swap_answers": False}
"""Hyperparameters that every method takes: `sft_weight` times the chosen answer's mean negative log-likelihood;
`swap_answers` prefers the rejected answers (how TIS-DPO's negative model is made).
"""

FROZEN_MODELS = ("oracle", "positive", "negative")
"""Frozen models that rules read and a recipe names: other labels of it, which are trained first, or model folders."""

_GPO = "https://arxiv.org/abs/2402.05749"

# fmt: off
_ROWS = [
    Method(
        "dpo", "DPO", loss="sigmoid", weights="uniform", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1, "label_smoothing": 0.0}, paper="https://arxiv.org/abs/2305.18290",
        note="Sums over tokens, so longer answers move the margin more. SimPO's tuned DPO baseline uses beta 0.01.",
    ),
    Method(
        "sampo", "SamPO", loss="sigmoid", weights="sampo", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1, "label_smoothing": 0.0}, paper="https://arxiv.org/abs/2406.10957",
        note="Policy and reference share the sampled tokens (the official code draws twice). `expected: true` takes "
        "the expectation of the weights, min(m, n) / length: length-matched DPO without sampling noise.",
    ),
    Method(
        "otpo", "OTPO", loss="sigmoid", weights="otpo", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1, "label_smoothing": 0.0},
        paper="https://aclanthology.org/2025.acl-long.1035",
        note="Defaults are the paper's Llama-3.2-3B setting (beta 0.1, reg 0.1, reg_m 0.2). The 8B setting is beta "
        "0.01, reg 1, where the weights are almost even: close to `sampo` with `expected: true`. Weights sum to "
        "min(m, n), so margins are smaller than DPO's at equal beta: tune beta and the learning rate for each. "
        "`iterations: 0` takes as many as `tolerance` needs; `layer` is an index into `hidden_states`.",
    ),
    Method(
        "otpo-simpo", "OTPO-SimPO", loss="simpo", weights="otpo", of_means=True, loss_needs=_NOTHING,
        loss_defaults={"beta": 2.0, "gamma_beta_ratio": 0.25, "label_smoothing": 0.0},
        paper="https://aclanthology.org/2025.acl-long.1035",
        note="SimPO whose mean over tokens is weighted by optimal transport; at large reg it is SimPO.",
    ),
    Method(
        "otpo-ipo", "OTPO-IPO", loss="ipo", weights="otpo", of_means=True, loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1}, paper="https://aclanthology.org/2025.acl-long.1035",
        note="IPO whose mean over tokens is weighted by optimal transport; at large reg it is `ipo`.",
    ),
    Method(
        "cdpo", "cDPO", loss="sigmoid", weights="uniform", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1, "label_smoothing": 0.2}, paper="https://ericmitchell.ai/cdpo.pdf",
        note="DPO that takes a share `label_smoothing` of the labels for flipped. Default of HALOs.",
    ),
    Method(
        "robust-dpo", "Robust DPO", loss="robust", weights="uniform", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1, "label_smoothing": 0.1}, paper="https://arxiv.org/abs/2403.00409",
        note="TRL's `robust`.",
    ),
    Method(
        "hinge", "SLiC (hinge)", loss="hinge", weights="uniform", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1}, paper="https://arxiv.org/abs/2305.10425",
        note="SLiC's loss on DPO's margin, as TRL's `hinge`; the hinge of GPO.",
    ),
    Method(
        "gpo-squared", "GPO (squared)", loss="squared", weights="uniform", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1}, paper=_GPO,
        note="IPO's loss with the target 1 on beta times the margin. GPO has no official code: beta is DPO's.",
    ),
    Method(
        "gpo-exponential", "GPO (exponential)", loss="exponential", weights="uniform", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1}, paper=_GPO,
        note="Grows fast on pairs that are ordered wrongly: lower learning rates.",
    ),
    Method(
        "gpo-truncated-quadratic", "GPO (truncated quadratic)", loss="truncated_quadratic", weights="uniform",
        loss_needs=_REFERENCE, loss_defaults={"beta": 0.1}, paper=_GPO, note="The squared hinge.",
    ),
    Method(
        "gpo-savage", "GPO (Savage)", loss="savage", weights="uniform", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1}, paper=_GPO, note="Bounded: pairs that are ordered very wrongly are given up.",
    ),
    Method(
        "ipo", "IPO", loss="ipo", weights="mean", of_means=True, loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1}, paper="https://arxiv.org/abs/2310.12036",
        note="Averaged over tokens, as its authors confirmed to TRL; `beta` is the paper's tau. `ipo-sum` sums.",
    ),
    Method(
        "ipo-sum", "IPO (summed)", loss="ipo", weights="uniform", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1}, paper="https://arxiv.org/abs/2310.12036",
        note="Summed over tokens, as in the DPO repository and OpenRLHF.",
    ),
    Method(
        "dpo-norm", "Length-normalised DPO", loss="sigmoid", weights="mean", of_means=True, loss_needs=_REFERENCE,
        loss_defaults={"beta": 5.0, "label_smoothing": 0.0}, paper="https://arxiv.org/abs/2411.15124",
        note="Tulu 3's DPO and beta; TRL's `sigmoid_norm`. Margins are means over tokens, hence the large beta.",
    ),
    Method(
        "ld-dpo", "LD-DPO", loss="sigmoid", weights="ld", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1, "label_smoothing": 0.0}, paper="https://arxiv.org/abs/2409.06411",
        note="Tokens beyond the shorter answer's length weigh `ld_alpha`, in policy and reference as in TRL; 1 is DPO.",
    ),
    Method(
        "ld-dpo-policy", "LD-DPO (policy only)", loss="sigmoid_whole_reference", weights="ld", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1, "label_smoothing": 0.0}, paper="https://arxiv.org/abs/2409.06411",
        note="As in LLaMA-Factory and TRL before 0.25: the reference is not weighted, so the loss does not start at "
        "log 2 where the answers differ in length.",
    ),
    Method(
        "r-dpo", "R-DPO", loss="length_regularized", weights="uniform", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1, "length_alpha": 0.01}, paper="https://arxiv.org/abs/2403.19159",
        note="`length_alpha` counts per token of difference in length; 0 is DPO. No official code: the default is "
        "that of the SamPO repository's script.",
    ),
    Method(
        "dpop", "DPOP (Smaug)", loss="dpop", weights="uniform", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1, "dpop_lambda": 50.0}, paper="https://arxiv.org/abs/2402.13228",
        note="Punishes a chosen answer that becomes less likely than under the reference.",
    ),
    Method(
        "wpo", "WPO", loss="wpo", weights="uniform", loss_needs=_REFERENCE | {"log_sum_squares"},
        loss_defaults={"beta": 0.01, "label_smoothing": 0.0}, paper="https://arxiv.org/abs/2406.11827",
        note="DPO whose pairs count as much as the policy would say them itself; TRL's `use_weighting`.",
    ),
    Method(
        "tdpo1", "TDPO1", loss="tdpo1", weights="uniform", loss_needs=_REFERENCE | {"reference_kl"},
        loss_defaults={"beta": 0.1}, paper="https://arxiv.org/abs/2404.11999",
        note="Holds the reference in memory beside the policy: its whole distribution at each token cannot be cached.",
    ),
    Method(
        "tdpo2", "TDPO2", loss="tdpo2", weights="uniform", loss_needs=_REFERENCE | {"reference_kl"},
        loss_defaults={"beta": 0.1, "tdpo_alpha": 0.5}, paper="https://arxiv.org/abs/2404.11999",
        note="Holds the reference in memory beside the policy. The official configuration's default is TDPO1, its "
        "README's TDPO2.",
    ),
    Method(
        "tgdpo", "TGDPO", loss="sigmoid", weights="tgdpo", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1, "label_smoothing": 0.0}, paper="https://arxiv.org/abs/2506.14574",
        note="`oracle` is a model trained by DPO, whose log-ratios are the tokens' rewards; `tgdpo_alpha: 0` is DPO.",
    ),
    Method(
        "tis-dpo", "TIS-DPO", loss="sigmoid", weights="tis", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1, "label_smoothing": 0.0},
        paper="https://arxiv.org/abs/2410.04350",
        note="`positive` is a model trained by DPO, `negative` one trained with `swap_answers: true`. `keep_ratio` is "
        "of `transform: binary`. The official code gives the last token (EOS) weight 0; here it weighs as it scores.",
    ),
    Method(
        "apo-zero", "APO-zero", loss="apo_zero", weights="uniform", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1}, paper="https://arxiv.org/abs/2408.06266",
        note="For chosen answers that are better than what the model says.",
    ),
    Method(
        "apo-down", "APO-down", loss="apo_down", weights="uniform", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1}, paper="https://arxiv.org/abs/2408.06266",
        note="For chosen answers that are worse than what the model says.",
    ),
    Method(
        "aot", "AOT", loss="aot", weights="uniform", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1, "label_smoothing": 0.0}, paper="https://arxiv.org/abs/2406.05882",
        note="Sorts margins over the global batch, whatever the micro-batches (TRL sorts each micro-batch), which "
        "takes a second forward pass.",
    ),
    Method(
        "aot-unpaired", "AOT (unpaired)", loss="aot_unpaired", weights="uniform", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1, "label_smoothing": 0.0}, paper="https://arxiv.org/abs/2406.05882",
        note="Sorts chosen and rejected answers over the global batch: which answers make a pair does not matter.",
    ),
    Method(
        "nca", "NCA", loss="nca", weights="uniform", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.01}, paper="https://arxiv.org/abs/2402.05369", note="TRL's `nca_pair`.",
    ),
    Method(
        "bco-pair", "BCO (pairs)", loss="bco_pair", weights="uniform", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1}, paper="https://arxiv.org/abs/2404.04656",
        note="TRL's `bco_pair`: without the reward shift of the paper's unpaired form.",
    ),
    Method(
        "sppo-hard", "SPPO (hard)", loss="sppo_hard", weights="uniform", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.001}, paper="https://arxiv.org/abs/2405.00675",
        note="TRL's `sppo_hard`: the chosen answer wins with probability 1, where the official code asks a ranker and "
        "takes half of the loss. `beta` sets the wanted log-ratio, 1 / (2 beta): 500 by default, 5 at DPO's 0.1.",
    ),
    Method(
        "exo", "EXO", loss="exo", weights="uniform", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1, "exo_epsilon": 1e-3}, paper="https://arxiv.org/abs/2402.00856",
        note="TRL's `exo_pair`; `exo_epsilon` is its `label_smoothing`. The official scripts use beta 0.5, and 0.1 for "
        "IMDB.",
    ),
    Method(
        "discopop", "DiscoPOP", loss="discopop", weights="uniform", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.05, "discopop_tau": 0.05}, paper="https://arxiv.org/abs/2406.08414",
        note="A loss that a language model found; not convex.",
    ),
    Method(
        "f-dpo", "f-DPO", loss="f_divergence", weights="uniform", loss_needs=_REFERENCE,
        loss_defaults={"beta": 0.1, "label_smoothing": 0.0, "divergence": "js", "divergence_alpha": 0.5},
        paper="https://arxiv.org/abs/2309.16240",
        note="DPO under another divergence from the reference; `divergence: reverse_kl` is DPO.",
    ),
    Method(
        "simpo", "SimPO", loss="simpo", weights="mean", of_means=True, loss_needs=_NOTHING,
        loss_defaults={"beta": 2.0, "gamma_beta_ratio": 0.25, "label_smoothing": 0.0},
        paper="https://arxiv.org/abs/2405.14734",
        note="Defaults of the official code; released models use beta 2 to 10 and gamma/beta 0.1 to 0.8, each tuned.",
    ),
    Method(
        "alphapo", "AlphaPO", loss="alphapo", weights="mean", of_means=True, loss_needs=_NOTHING,
        loss_defaults={"beta": 2.0, "gamma_beta_ratio": 0.25, "label_smoothing": 0.0, "alphapo_alpha": 0.25},
        paper="https://arxiv.org/abs/2501.03884",
        note="SimPO with another shape of the reward; `alphapo_alpha: 0` is SimPO. No official code: tune alpha.",
    ),
    Method(
        "confpo", "ConfPO", loss="simpo_selected", weights="confpo", of_means=True, loss_needs=_NOTHING,
        loss_defaults={"beta": 1.5, "gamma_beta_ratio": 1.6 / 1.5, "label_smoothing": 0.0},
        paper="https://arxiv.org/abs/2506.08712",
        note="SimPO on the tokens that the policy is less sure of than of the answer's tokens on average.",
    ),
    Method(
        "sepo", "SePO", loss="simpo", weights="sepo", of_means=True, loss_needs=_NOTHING,
        loss_defaults={"beta": 1.0, "gamma_beta_ratio": 0.0, "label_smoothing": 0.0},
        paper="https://arxiv.org/abs/2408.13518",
        note="`oracle` is a (small) model trained by DPO. Trains on the best-scored share of the chosen answer's "
        "tokens and the worst-scored of the rejected one's; beta and gamma as the official code has them.",
    ),
    Method(
        "cpo", "CPO", loss="cpo", weights="uniform", loss_needs=_NOTHING,
        loss_defaults={"beta": 0.1, "cpo_alpha": 1.0, "label_smoothing": 0.0}, paper="https://arxiv.org/abs/2401.08417",
        note="`cpo_alpha` weighs the likelihood of the chosen answer.",
    ),
    Method(
        "orpo", "ORPO", loss="orpo", weights="mean", of_means=True, loss_needs=_NOTHING,
        loss_defaults={"orpo_lambda": 0.1}, paper="https://arxiv.org/abs/2403.07691",
        note="The released models' lambda (the official code's default is 1; TRL calls it beta). The likelihood is of "
        "the chosen answer as in LLaMA-Factory; the official code and TRL count the prompt's tokens too.",
    ),
    Method(
        "kto", "KTO", loss="kto", weights="uniform", loss_needs=_REFERENCE | {"unpaired"},
        loss_defaults={"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        paper="https://arxiv.org/abs/2402.01306",
        note="Takes `{prompt, completion, label}` rows, or splits pairs into two completions each as TRL does; batches "
        "and epochs count completions. Keep desirable_weight n_D / (undesirable_weight n_U) between 1 and 4/3. The KL "
        "term is of the global batch; its mismatched completions take a second forward pass.",
    ),
    Method(
        "reward-model", "Reward model", loss="bradley_terry", weights="uniform", loss_needs=frozenset({"reward_head"}),
        loss_defaults={"center_rewards_coefficient": 0.0}, paper="https://arxiv.org/abs/2203.02155",
        note="Scores answers (`judge.reward_model`, `pairs.scorer.reward_model`) and writes none. Rows with a `margin` "
        "say by how much the chosen answer is better. TRL's learning rate is 1e-4; 0.01 is the usual coefficient.",
    ),
]
# fmt: on

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
