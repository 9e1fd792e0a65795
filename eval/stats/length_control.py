"""Win rates with the lengths of the outputs held equal: two estimates with two names.

`length_controlled` is AlpacaEval's definition (Dubois et al. 2024, arXiv:2404.04475; code: `length_controlled_v1` in
alpaca_eval/metrics/glm_winrate.py). It needs calibration files that belong to AlpacaEval's 805 instructions and the
reference gpt4_1106_preview, and is defined for nothing else. `length_adjusted` is the same idea without those files. It
estimates the win rate on any prompts if no output were longer than the reference's, and cannot be compared with
published length-controlled numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from eval.stats.intervals import HALF, Interval
from eval.stats.win_rate import valid_preferences
from otpo.errors import UserError

OFFICIAL_REFERENCE = "gpt4_1106_preview"
# Hash of the 805 instructions in their published order; the calibration files know them only by position.
OFFICIAL_INSTRUCTIONS_SHA256 = "c5770d532bf3f697768ed9a57a05d8b58b2617321ca65070620f059676e7c99a"
# Weight of the rows of both gamed baselines together (`regularize_to_baseline_lambda`).
GAMED_WEIGHT = 0.2
# Ridge penalties. Without one, the length coefficient would be infinite if length alone decided every verdict.
SLOPE_RIDGE, LEVEL_RIDGE = 0.04, 1e-6
# A penalty that hardly holds anything: what the other one alone decides is what the two fits differ by.
WEAK_RIDGE, TELLING_POINTS = SLOPE_RIDGE / 100, 0.5
RESAMPLES = 2000
# A step of Newton's method after which it ends, of the estimate and of its resamples; the next is about its square.
SMALL_STEP, SMALL_STEP_RESAMPLED = 1e-8, 1e-3
BLOCK = 2**16  # values that are worked on at a time: they stay in the processor's cache


@dataclass(frozen=True)
class Calibration:
    """AlpacaEval's calibration.

    Attributes:
        difficulty: (n,) of the instructions.
        gamed_features: (g, 3) of the gamed baselines' rows: length difference, difficulty, whether it is not gamed.
        gamed_preference: (g,) of these rows, in [0, 1].
        files: names of the files.
    """

    difficulty: np.ndarray
    gamed_features: np.ndarray
    gamed_preference: np.ndarray
    files: tuple[str, ...]


def load_calibration(folder: Path) -> Calibration:
    """Read `instruction_difficulty.csv` and the one `df_gamed*.csv` of a folder.

    Raises:
        UserError: a file is missing, there are several gamed files, or a published column is missing.
    """
    difficulty_path, gamed_paths = folder / "instruction_difficulty.csv", sorted(folder.glob("df_gamed*.csv"))
    if not difficulty_path.is_file() or len(gamed_paths) != 1:
        found = sorted(p.name for p in folder.glob("*.csv")) if folder.is_dir() else "no such folder"
        raise UserError(
            f"calibration {folder}: expected instruction_difficulty.csv and one df_gamed*.csv, found {found}. "
            "Both come with the AlpacaEval data set; without `calibration` the board shows length_adjusted_winrate."
        )
    difficulty, gamed = pd.read_csv(difficulty_path, index_col=0), pd.read_csv(gamed_paths[0])
    needed = ["preference", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline"]
    for path, frame, columns in [(difficulty_path, difficulty, needed[3:4]), (gamed_paths[0], gamed, needed)]:
        if missing := [c for c in columns if c not in frame]:
            raise UserError(f"calibration {path}: expected the columns {columns}, missing {missing}.")
    features = np.column_stack(
        [
            np.tanh(gamed["std_delta_len"].to_numpy(float)),
            gamed["instruction_difficulty"].to_numpy(float),
            gamed["not_gamed_baseline"].to_numpy(bool).astype(float),
        ]
    )
    return Calibration(
        difficulty=difficulty["instruction_difficulty"].sort_index().to_numpy(float),
        gamed_features=features,
        gamed_preference=gamed["preference"].to_numpy(float),
        files=(difficulty_path.name, gamed_paths[0].name),
    )


def why_not_official(reference: Sequence[Mapping[str, Any]]) -> str:
    """Why AlpacaEval's calibration does not apply to a reference; empty if it does.

    It applies to AlpacaEval's 805 instructions, in order, with outputs of gpt4_1106_preview.
    """
    if len(reference) != 805:
        return f"the reference has {len(reference)} outputs, not AlpacaEval's 805"
    digest = hashlib.sha256(json.dumps([row["instruction"] for row in reference]).encode()).hexdigest()
    if digest != OFFICIAL_INSTRUCTIONS_SHA256:
        return "the reference's instructions are not AlpacaEval's 805 in their published order"
    if generators := {str(row.get("generator")) for row in reference} - {OFFICIAL_REFERENCE}:
        return f"the reference's outputs are by {', '.join(sorted(generators))}, not {OFFICIAL_REFERENCE}"
    return ""


def standard_length_difference(reference_lengths: npt.ArrayLike, lengths: npt.ArrayLike) -> np.ndarray:
    """(n,) length of the reference minus the model's, over its standard deviation (ddof 1; not centred).

    It is NaN where a length is; there can be no verdict there.
    """
    delta = np.asarray(reference_lengths, dtype=float) - np.asarray(lengths, dtype=float)
    known = delta[~np.isnan(delta)]
    spread = known.std(ddof=1) if len(known) > 1 else 0.0
    if spread > 0:
        return delta / spread
    return np.sign(delta)


def length_controlled(
    preference: npt.ArrayLike, reference_lengths: npt.ArrayLike, lengths: npt.ArrayLike, calibration: Calibration
) -> dict[str, float]:
    """AlpacaEval's length-controlled win rate of one model (`length_controlled_v1`).

    A logistic model without intercept, logit P(model wins) = a tanh(d) + b difficulty + c not_gamed, with d from
    `standard_length_difference`. It has an L1 penalty, whose strength 5-fold cross-validation grouped by prompt
    chooses. The win rate is its mean prediction with d = 0.

    Args:
        preference: (n,) in the calibration's order. NaN where the judge gave no verdict; these rows are predicted but
            not fitted.
        reference_lengths: (n,) characters.
        lengths: (n,) characters.
        calibration: of the same n instructions.

    Returns:
        length_controlled_winrate and lc_standard_error. The latter is AlpacaEval's: the spread of the fitted
        probabilities over prompts. As a sampling error it would be several times too small.
    """
    chance = valid_preferences(preference) - 1
    if len(chance) != len(calibration.difficulty):
        raise ValueError(f"{len(chance)} verdicts for {len(calibration.difficulty)} calibrated instructions")
    if np.isnan(chance).all():
        return {"length_controlled_winrate": math.nan, "lc_standard_error": math.nan}
    delta = standard_length_difference(reference_lengths, lengths)
    own = np.column_stack([np.tanh(delta), calibration.difficulty, np.ones_like(delta)])
    # Gamed rows first, as in alpaca_eval: the order decides which prompts share a fold.
    features = np.vstack([calibration.gamed_features, own])
    target = np.concatenate([calibration.gamed_preference, chance])
    weight = np.where(features[:, 2] == 1, 1.0, GAMED_WEIGHT / 2)
    kept = ~np.isnan(target)
    model = _fit_soft_labels(features[kept], target[kept], weight[kept])
    own[:, 0] = 0.0
    predicted = model.predict_proba(own)[:, 1] * 100
    return {
        "length_controlled_winrate": float(predicted.mean()),
        "lc_standard_error": float(predicted.std(ddof=1) / math.sqrt(len(predicted))),
    }


def _fit_soft_labels(features: np.ndarray, target: np.ndarray, weight: np.ndarray) -> Any:
    """Logistic regression on probabilities: each row enters twice, as a win with weight p and a loss with 1 - p."""
    import sklearn
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.metrics import make_scorer
    from sklearn.model_selection import GroupKFold

    def log_loss(y_true: np.ndarray, y_pred: np.ndarray, prob: np.ndarray, true_weight: np.ndarray) -> float:
        p, q = np.where(y_true == 1, prob, 1 - prob), np.clip(y_pred, 1e-15, 1 - 1e-15)
        return float(-np.mean(true_weight * (p * np.log(q) + (1 - p) * np.log(1 - q))))

    prob, true_weight = np.concatenate([target, 1 - target]), np.concatenate([weight, weight])
    labels = np.repeat([1, 0], len(target))
    with warnings.catch_warnings(), sklearn.config_context(enable_metadata_routing=True):
        # scikit-learn warns of future names of `penalty` and of fitted attributes; the fit is the same.
        warnings.simplefilter("ignore")
        scorer = make_scorer(log_loss, response_method="predict_proba", greater_is_better=False)
        model = LogisticRegressionCV(
            cv=GroupKFold(n_splits=5),
            scoring=scorer.set_score_request(prob=True, true_weight=True),
            penalty="l1",
            solver="liblinear",
            fit_intercept=False,
            random_state=123,
        )
        model.set_fit_request(sample_weight=True)
        model.fit(
            np.vstack([features, features]),
            labels,
            sample_weight=prob * true_weight,
            groups=np.tile(np.arange(len(target)), 2),
            prob=prob,
            true_weight=true_weight,
        )
    return model


def length_adjusted(
    preference: npt.ArrayLike, reference_lengths: npt.ArrayLike, lengths: npt.ArrayLike, *, seed: int = 0
) -> tuple[float | None, Interval]:
    """Win rate at equal length, from these verdicts alone, with a 95 % interval over prompts. In percent.

    Fits logit P(model wins) = a tanh(d) + c by maximum likelihood, with preferences as soft labels and a weak ridge
    that keeps `a` finite. The estimate is the prediction at d = 0. If all lengths are equal, it is the win rate.

    The interval is the Bayesian bootstrap's of the prompts and of half a win and half a loss at their mean length, so
    that it does not collapse where all verdicts are nearly equal. Where lengths hardly overlap, the ridge decides how
    far the fit is followed to d = 0; the interval then holds that of a fit with hardly any, and its note says so.

    Args:
        preference: (n,) preferences, NaN allowed.
        reference_lengths: (n,) characters.
        lengths: (n,) characters.
        seed: of the bootstrap. The same seed and number of verdicts give the same resamples, to every model of a board:
            what differs between two models' intervals is their verdicts.
    """
    chance = valid_preferences(preference) - 1
    kept = ~np.isnan(chance)
    n = int(kept.sum())
    if n == 0:
        return None, Interval(None, None, "no verdict came back, so nothing can be said")
    x = np.tanh(standard_length_difference(reference_lengths, lengths))[kept]
    y = chance[kept]
    estimate, weak = (float(_levels(x, y, np.ones((1, n)), ridge)[0]) for ridge in (SLOPE_RIDGE, WEAK_RIDGE))
    counts = _resamples(seed, n)
    x, y = np.append(x, [x.mean()] * 2), np.append(y, [0.0, 1.0])
    moved = abs(estimate - weak)
    ridges = [SLOPE_RIDGE, WEAK_RIDGE] if moved > TELLING_POINTS else [SLOPE_RIDGE]
    ends = [estimate, *(end for ridge in ridges for end in np.percentile(_levels(x, y, counts, ridge), [2.5, 97.5]))]
    note = ""
    if moved > TELLING_POINTS:
        note = (
            f"lengths hardly overlap: the length-adjusted win rate extrapolates, and its ridge alone moves it by "
            f"{moved:.1f} points"
        )
    return estimate, Interval(float(min(ends)), float(max(ends)), note)


@lru_cache(maxsize=1)  # the models of a board have it in common
def _resamples(seed: int, n: int) -> np.ndarray:
    """(RESAMPLES, n + 2) weights of n prompts, and of half a win and half a loss."""
    rng = np.random.default_rng(seed)
    counts = np.hstack([rng.standard_exponential((RESAMPLES, n)), rng.gamma(HALF, size=(RESAMPLES, 2))])
    counts.setflags(write=False)
    return counts


def _levels(x: np.ndarray, y: np.ndarray, counts: np.ndarray, slope_ridge: float) -> np.ndarray:
    """(b,) levels 100 sigmoid(c) of b fits to rows x, y (n,) with weights `counts` (b, n), by Newton's method.

    All fits begin at that of the mean weights, so their first step is one matrix product.
    """
    theta = (
        np.zeros((1, 2))
        if len(counts) == 1
        else _newton(np.zeros((1, 2)), x, y, counts.mean(axis=0)[None], slope_ridge)
    )
    return 100 / (1 + np.exp(-_newton(theta, x, y, counts, slope_ridge)[:, 1]))


def _newton(start: np.ndarray, x: np.ndarray, y: np.ndarray, counts: np.ndarray, slope_ridge: float) -> np.ndarray:
    """(b, 2) parameters a, c of the fits, from common ones (1, 2)."""
    theta, ridge = np.repeat(start, len(counts), axis=0), np.array([slope_ridge, LEVEL_RIDGE])
    small = SMALL_STEP if len(counts) == 1 else SMALL_STEP_RESAMPLED
    moving, sums = np.arange(len(counts)), _sums(start, x, y, counts)
    for _ in range(50):
        gradient = sums[:, :2] - ridge * theta[moving]
        h_aa, h_ac, h_cc = sums[:, 2] + ridge[0], sums[:, 3], sums[:, 4] + ridge[1]
        det = h_aa * h_cc - h_ac * h_ac
        step = np.stack(
            [h_cc * gradient[:, 0] - h_ac * gradient[:, 1], h_aa * gradient[:, 1] - h_ac * gradient[:, 0]], axis=1
        )
        # Capped steps keep nearly separable resamples from overshooting.
        step = np.clip(step / det[:, None], -2.0, 2.0)
        theta[moving] += step
        moving = moving[np.abs(step).max(axis=1) > small]
        if not len(moving):
            break
        sums = _sums(theta[moving], x, y, counts[moving])
    return theta


def _sums(theta: np.ndarray, x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(b, 5) gradient by a and c, and the negative second derivatives by a and a, a and c, c and c, without ridge."""
    first, second = np.stack([x, np.ones_like(x)], axis=1), np.stack([x * x, x, np.ones_like(x)], axis=1)
    if len(theta) == 1:
        p = 1 / (1 + np.exp(-np.clip(theta[:, :1] * x + theta[:, 1:], -30, 30)))
        return counts @ np.hstack([(y - p).T * first, (p * (1 - p)).T * second])
    sums, step = np.empty((len(theta), 5)), max(1, BLOCK // len(x))
    for start in range(0, len(theta), step):
        some = slice(start, start + step)
        p = 1 / (1 + np.exp(-np.clip(theta[some, :1] * x + theta[some, 1:], -30, 30)))
        sums[some, :2], sums[some, 2:] = (counts[some] * (y - p)) @ first, (counts[some] * (p * (1 - p))) @ second
    return sums
