"""Methods of pairs against a frozen reference. Their losses are in `losses.pairwise` and `losses.coupled`."""

from __future__ import annotations

from otpo.methods.registry.hyperparameters import (
    BETA,
    DISCOPOP_TAU,
    DIVERGENCE,
    DIVERGENCE_ALPHA,
    DPOP_LAMBDA,
    EXO_EPSILON,
    LABEL_SMOOTHING,
    LENGTH_ALPHA,
    TDPO_ALPHA,
)
from otpo.methods.registry.rows import REFERENCE, Loss, Method
from otpo.methods.registry.weight_rules import LD, MEAN, OTPO, SAMPO, TGDPO, TIS, UNIFORM

SIGMOID = Loss("pairwise:sigmoid", (BETA, LABEL_SMOOTHING), REFERENCE)
IPO = Loss("pairwise:ipo", (BETA,), REFERENCE)

_GPO = "https://arxiv.org/abs/2402.05749"
_OTPO = "https://aclanthology.org/2025.acl-long.1035"

# fmt: off
METHODS = [
    Method(
        "dpo", "DPO", SIGMOID, UNIFORM,
        paper="https://arxiv.org/abs/2305.18290",
        note="Sums over tokens, so longer completions move the margin more. SimPO's tuned DPO baseline uses beta 0.01.",
    ),
    Method(
        "sampo", "SamPO", SIGMOID, SAMPO,
        paper="https://arxiv.org/abs/2406.10957",
        note="Policy and reference share the sampled tokens; the official code draws twice. `expected: true` takes "
        "the expectation of the weights, min(m, n) / length: length-matched DPO without sampling noise.",
    ),
    Method(
        "otpo", "OTPO", SIGMOID, OTPO,
        paper=_OTPO,
        note="Defaults are the paper's Llama-3.2-3B setting (beta 0.1, reg 0.1, reg_m 0.2). The 8B setting is beta "
        "0.01, reg 1, where the weights are almost even: close to `sampo` with `expected: true`. Weights sum to "
        "min(m, n), so margins are smaller than DPO's at equal beta: tune beta and the learning rate of each.",
    ),
    Method(
        "otpo-ipo", "OTPO-IPO", IPO, OTPO, means=True,
        paper=_OTPO,
        note="IPO whose mean over tokens is weighted by optimal transport; at large reg it is `ipo`.",
    ),
    Method(
        "cdpo", "cDPO", SIGMOID, UNIFORM, {"label_smoothing": 0.2},
        paper="https://ericmitchell.ai/cdpo.pdf",
        note="DPO that assumes a fraction `label_smoothing` of the labels to be flipped. Default of HALOs.",
    ),
    Method(
        "robust-dpo", "Robust DPO", Loss("pairwise:robust", (BETA, LABEL_SMOOTHING), REFERENCE), UNIFORM,
        {"label_smoothing": 0.1},
        paper="https://arxiv.org/abs/2403.00409",
        note="TRL's `robust`.",
    ),
    Method(
        "hinge", "SLiC (hinge)", Loss("pairwise:hinge", (BETA,), REFERENCE), UNIFORM,
        paper="https://arxiv.org/abs/2305.10425",
        note="SLiC's loss on DPO's margin, as TRL's `hinge`; the hinge of GPO.",
    ),
    Method(
        "gpo-squared", "GPO (squared)", Loss("pairwise:squared", (BETA,), REFERENCE), UNIFORM,
        paper=_GPO,
        note="IPO's loss with the target 1 on beta times the margin. GPO has no official code: beta is DPO's.",
    ),
    Method(
        "gpo-exponential", "GPO (exponential)", Loss("pairwise:exponential", (BETA,), REFERENCE), UNIFORM,
        paper=_GPO,
        note="Grows fast on pairs that are ordered wrongly: use lower learning rates.",
    ),
    Method(
        "gpo-truncated-quadratic", "GPO (truncated quadratic)",
        Loss("pairwise:truncated_quadratic", (BETA,), REFERENCE), UNIFORM,
        paper=_GPO,
        note="The squared hinge.",
    ),
    Method(
        "gpo-savage", "GPO (Savage)", Loss("pairwise:savage", (BETA,), REFERENCE), UNIFORM,
        paper=_GPO,
        note="Bounded: pairs that are ordered very wrongly are given up.",
    ),
    Method(
        "ipo", "IPO", IPO, MEAN, means=True,
        paper="https://arxiv.org/abs/2310.12036",
        note="Averaged over tokens, as its authors confirmed to TRL; `beta` is the paper's tau. `ipo-sum` sums.",
    ),
    Method(
        "ipo-sum", "IPO (summed)", IPO, UNIFORM,
        paper="https://arxiv.org/abs/2310.12036",
        note="Summed over tokens, as in the DPO repository and OpenRLHF.",
    ),
    Method(
        "dpo-norm", "Length-normalised DPO", SIGMOID, MEAN, {"beta": 5.0}, means=True,
        paper="https://arxiv.org/abs/2411.15124",
        note="Tulu 3's DPO and beta; TRL's `sigmoid_norm`. Margins are means over tokens, hence the large beta.",
    ),
    Method(
        "ld-dpo", "LD-DPO", SIGMOID, LD,
        paper="https://arxiv.org/abs/2409.06411",
        note="Tokens beyond the shorter completion's length have weight `ld_alpha`, in policy and reference as in TRL; "
        "1 is DPO.",
    ),
    Method(
        "ld-dpo-policy", "LD-DPO (policy only)",
        Loss("pairwise:sigmoid_whole_reference", (BETA, LABEL_SMOOTHING), REFERENCE), LD,
        paper="https://arxiv.org/abs/2409.06411",
        note="As in LLaMA-Factory and TRL before 0.25: the reference is not weighted, so the loss does not start at "
        "log 2 where the completions differ in length.",
    ),
    Method(
        "r-dpo", "R-DPO", Loss("pairwise:length_regularized", (BETA, LENGTH_ALPHA), REFERENCE), UNIFORM,
        paper="https://arxiv.org/abs/2403.19159",
        note="`length_alpha: 0` is DPO. No official code: the default is that of the SamPO repository's script.",
    ),
    Method(
        "dpop", "DPOP (Smaug)", Loss("pairwise:dpop", (BETA, DPOP_LAMBDA), REFERENCE), UNIFORM,
        paper="https://arxiv.org/abs/2402.13228",
        note="Punishes a chosen completion that becomes less likely than under the reference.",
    ),
    Method(
        "wpo", "WPO", Loss("pairwise:wpo", (BETA, LABEL_SMOOTHING), REFERENCE | {"log_sum_squares"}), UNIFORM,
        {"beta": 0.01},
        paper="https://arxiv.org/abs/2406.11827",
        note="DPO in which a pair counts as much as the policy is likely to generate it; TRL's `use_weighting`.",
    ),
    Method(
        "tdpo1", "TDPO1", Loss("pairwise:tdpo1", (BETA,), REFERENCE | {"reference_kl"}), UNIFORM,
        paper="https://arxiv.org/abs/2404.11999",
        note="Holds the reference in memory beside the policy: its whole distribution at each token cannot be cached.",
    ),
    Method(
        "tdpo2", "TDPO2", Loss("pairwise:tdpo2", (BETA, TDPO_ALPHA), REFERENCE | {"reference_kl"}), UNIFORM,
        paper="https://arxiv.org/abs/2404.11999",
        note="Holds the reference in memory beside the policy. The official configuration defaults to TDPO1, its "
        "README to TDPO2.",
    ),
    Method(
        "tgdpo", "TGDPO", SIGMOID, TGDPO,
        paper="https://arxiv.org/abs/2506.14574",
        note="`oracle` is a model trained by DPO, whose log-ratios are the tokens' rewards; `tgdpo_alpha: 0` is DPO.",
    ),
    Method(
        "tis-dpo", "TIS-DPO", SIGMOID, TIS,
        paper="https://arxiv.org/abs/2410.04350",
        note="`positive` is a model trained by DPO, `negative` one trained with `swap_answers: true`. `keep_ratio` "
        "only counts with `transform: binary`. The official code gives the last token (EOS) weight 0; here it is "
        "weighted like any other.",
    ),
    Method(
        "apo-zero", "APO-zero", Loss("pairwise:apo_zero", (BETA,), REFERENCE), UNIFORM,
        paper="https://arxiv.org/abs/2408.06266",
        note="For chosen completions that are better than the model's own outputs.",
    ),
    Method(
        "apo-down", "APO-down", Loss("pairwise:apo_down", (BETA,), REFERENCE), UNIFORM,
        paper="https://arxiv.org/abs/2408.06266",
        note="For chosen completions that are worse than the model's own outputs.",
    ),
    Method(
        "aot", "AOT",
        Loss("coupled:aot", (BETA, LABEL_SMOOTHING), REFERENCE, collects="coupled:aot_values"), UNIFORM,
        paper="https://arxiv.org/abs/2406.05882",
        note="Sorts margins over the global batch, whatever the micro-batches (TRL sorts each micro-batch), which "
        "takes a second forward pass.",
    ),
    Method(
        "aot-unpaired", "AOT (unpaired)",
        Loss("coupled:aot_unpaired", (BETA, LABEL_SMOOTHING), REFERENCE, collects="coupled:aot_unpaired_values"),
        UNIFORM,
        paper="https://arxiv.org/abs/2406.05882",
        note="Sorts chosen and rejected completions over the global batch: it does not matter which two make a pair.",
    ),
    Method(
        "nca", "NCA", Loss("pairwise:nca", (BETA,), REFERENCE), UNIFORM, {"beta": 0.01},
        paper="https://arxiv.org/abs/2402.05369",
        note="TRL's `nca_pair`.",
    ),
    Method(
        "bco-pair", "BCO (pairs)", Loss("pairwise:bco_pair", (BETA,), REFERENCE), UNIFORM,
        paper="https://arxiv.org/abs/2404.04656",
        note="TRL's `bco_pair`: without the reward shift of the paper's unpaired form.",
    ),
    Method(
        "sppo-hard", "SPPO (hard)", Loss("pairwise:sppo_hard", (BETA,), REFERENCE), UNIFORM, {"beta": 0.001},
        paper="https://arxiv.org/abs/2405.00675",
        note="TRL's `sppo_hard`: the chosen completion wins with probability 1, where the official code asks a ranker "
        "and takes half of the loss. `beta` sets the log-ratio aimed at, 1 / (2 beta): 500 by default, 5 at DPO's 0.1.",
    ),
    Method(
        "exo", "EXO", Loss("pairwise:exo", (BETA, EXO_EPSILON), REFERENCE), UNIFORM,
        paper="https://arxiv.org/abs/2402.00856",
        note="TRL's `exo_pair`; `exo_epsilon` is its `label_smoothing`. The official scripts use beta 0.5, and 0.1 for "
        "IMDB.",
    ),
    Method(
        "discopop", "DiscoPOP", Loss("pairwise:discopop", (BETA, DISCOPOP_TAU), REFERENCE), UNIFORM, {"beta": 0.05},
        paper="https://arxiv.org/abs/2406.08414",
        note="A loss that a language model found; not convex.",
    ),
    Method(
        "f-dpo", "f-DPO",
        Loss("pairwise:f_divergence", (BETA, LABEL_SMOOTHING, DIVERGENCE, DIVERGENCE_ALPHA), REFERENCE), UNIFORM,
        paper="https://arxiv.org/abs/2309.16240",
        note="DPO under another divergence from the reference; `divergence: reverse_kl` is DPO.",
    ),
]
# fmt: on
