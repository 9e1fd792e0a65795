"""Which models can be told apart, and what that leaves open about their ranks.

Every two models are tested on the prompts that both were judged on. The prompt is what is drawn: both orders of it are
averaged first, and what makes it hard for both models cancels out. The test is the one that belongs to the intervals of
`eval.stats.intervals`: it rejects at 5 % exactly where the 95 % interval of the difference leaves out zero. Holm's
correction holds the chance of any wrong claim on the whole board at 5 %. Nothing is drawn at random, so no seed changes
a rank.

The ranks that the claims leave possible are a simultaneous confidence set (Mogstad, Romano, Shaikh and Wilhelm 2024,
doi:10.1093/restud/rdad006).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from eval.stats.intervals import CONFIDENCE, ROWS_AT_ONCE
from eval.stats.paired_differences import DETECTABLE_Z

LEVEL = 1 - CONFIDENCE
STEPS = 100  # of Newton's method, safeguarded by bisection; it takes about eight


@dataclass(frozen=True)
class Comparisons:
    """Every two of m models. Arrays are (m, m): row against column.

    Attributes:
        difference: points of win rate, row minus column, on common prompts; NaN if there are none.
        n: common prompts with both verdicts.
        detectable: the smallest difference in points that n such prompts show with 80 % power in one 5 % test.
        p: of no difference, two-sided; NaN without common prompts.
        p_missing: the same, if every missing verdict on a common prompt had spoken for the model that is behind.
        p_holm: `p_missing`, corrected by Holm over all pairs.
        better: whether the row is shown to be better than the column.
        withheld: whether the two would be told apart if missing verdicts were ignored, and are not.
    """

    difference: np.ndarray
    n: np.ndarray
    detectable: np.ndarray
    p: np.ndarray
    p_missing: np.ndarray
    p_holm: np.ndarray
    better: np.ndarray
    withheld: np.ndarray

    @property
    def prompts_needed(self) -> np.ndarray:
        """Prompts with which the observed difference would show with 80 % power in one 5 % test; NaN if unknown."""
        with np.errstate(divide="ignore", invalid="ignore"):
            needed = np.ceil(self.n * (self.detectable / self.difference) ** 2)
        # A mean or a spread of 0 may come out as 1e-15, and would ask for 1e30 prompts, or for one.
        told = np.minimum(np.abs(self.difference), self.detectable) > 1e-9
        return np.where(np.isfinite(needed) & told, needed, np.nan)


def compare(chance: npt.ArrayLike, asked: npt.ArrayLike | None = None) -> Comparisons:
    """Test every two models for a difference.

    Args:
        chance: (m, n) probability in [0, 1] that the model wins on the prompt; NaN where there is no verdict.
        asked: (m, n) whether a verdict was asked for: without one, it is missing. Default: nothing is missing.
    """
    x = np.asarray(chance, dtype=float)
    known = ~np.isnan(x)
    wanted = known if asked is None else known | np.asarray(asked, dtype=bool)
    least, most = np.where(known, x, 0.0), np.where(known, x, 1.0)
    first, second = np.triu_indices(len(x), 1)
    step = max(1, ROWS_AT_ONCE // max(x.shape[1], 1))
    parts = []
    for start in range(0, len(first), step):
        i, j = first[start : start + step], second[start : start + step]
        both, common = known[i] & known[j], wanted[i] & wanted[j]
        delta = np.where(both, least[i] - least[j], 0.0)
        n = both.sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = delta.sum(axis=1) / n
            spread = np.sqrt(np.square(np.where(both, delta - mean[:, None], 0.0)).sum(axis=1) / (n - 1))
            detectable = np.where(n > 1, 100 * DETECTABLE_Z * spread / np.sqrt(n), np.nan)
        p = np.where(n > 0, _no_difference(delta), np.nan)
        p_missing = p.copy()
        lacking = np.flatnonzero((common & ~both).any(axis=1) & (n > 0))
        if len(lacking):
            swapped = mean[lacking] < 0
            ahead = np.where(swapped, j[lacking], i[lacking])
            behind = np.where(swapped, i[lacking], j[lacking])
            worst = np.where(common[lacking], least[ahead] - most[behind], 0.0)
            p_missing[lacking] = np.where(worst.sum(axis=1) > 0, _no_difference(worst), 1.0)
        parts.append(np.stack([100 * mean, n, detectable, p, p_missing]))
    columns = np.concatenate(parts, axis=1) if parts else np.empty((5, 0))
    mean, n, detectable, p, p_missing = columns
    told, ignoring = holm(p_missing), holm(p) < LEVEL

    def square(values: np.ndarray, diagonal: float, mirrored: float = 1.0) -> np.ndarray:
        full = np.full((len(x), len(x)), diagonal)
        full[first, second], full[second, first] = values, mirrored * values
        return full

    difference, p_holm = square(mean, 0.0, -1.0), square(told, 1.0)
    apart = p_holm < LEVEL
    return Comparisons(
        difference=difference,
        n=square(n, 0.0).astype(int),
        detectable=square(detectable, np.nan),
        p=square(p, 1.0),
        p_missing=square(p_missing, 1.0),
        p_holm=p_holm,
        better=apart & (np.nan_to_num(difference) > 0),
        withheld=(square(ignoring.astype(float), 0.0) > 0) & ~apart,
    )


def no_difference(differences: npt.ArrayLike) -> np.ndarray:
    """(r,) two-sided p-values of the hypothesis that rows of paired differences are drawn around zero.

    Args:
        differences: (r, n) in [-1, 1]; NaN are left out. A row of NaN has p = 1.
    """
    return _no_difference(np.nan_to_num(np.atleast_2d(np.asarray(differences, dtype=float)), nan=0.0))


def _no_difference(y: np.ndarray) -> np.ndarray:
    """`no_difference` of rows in which 0 stands for what is left out: a zero says nothing about the sign.

    Of all probabilities under which a row and half an observation at -1 and at 1 have the mean 0, those that are
    proportional to 1 / (1 + u y) have the greatest empirical likelihood.
    """
    from scipy.special import ndtr

    y = np.clip(y, -1.0, 1.0)
    u, low, high = np.zeros(len(y)), np.full(len(y), -1.0), np.full(len(y), 1.0)
    at, rows = np.arange(len(y)), y  # those that have not converged yet
    for _ in range(STEPS):
        v = u[at]
        q = rows / (1.0 + v[:, None] * rows)
        surplus = q.sum(axis=1) - v / (1.0 - v * v)
        slope = np.einsum("ij,ij->i", q, q) + 0.5 * (1.0 / (1.0 + v) ** 2 + 1.0 / (1.0 - v) ** 2)
        low, high = np.where(surplus > 0, v, low), np.where(surplus > 0, high, v)
        new = v + surplus / slope
        new = np.where((new > low) & (new < high), new, (low + high) / 2)
        moved = np.abs(new - v) > 1e-11 * (1.0 - np.abs(v))
        u[at] = new
        if not moved.any():
            break
        if not moved.all():
            at, rows, low, high = at[moved], rows[moved], low[moved], high[moved]
    tilt = u[:, None] * y
    curvature = np.square(y / (1.0 + tilt)).sum(axis=1) + 0.5 * (1.0 / (1.0 + u) ** 2 + 1.0 / (1.0 - u) ** 2)
    # log1p: a difference of 1e-6 would be lost in 1 + tilt, and the correction below be made of rounding errors
    root = np.sqrt(np.maximum(2.0 * np.log1p(tilt).sum(axis=1) + np.log1p(-u * u), 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        adjusted = root + np.log(np.abs(u) * np.sqrt(curvature) / root) / root
    z = np.where(root > 1e-5, adjusted, root)
    return 2.0 * ndtr(-np.abs(z))


def holm(p: npt.ArrayLike) -> np.ndarray:
    """p-values after Holm's correction (1979, jstor:4615733), in their order; NaN are no tests and become 1."""
    values = np.asarray(p, dtype=float)
    tested = np.flatnonzero(~np.isnan(values))
    order = tested[np.argsort(values[tested], kind="stable")]
    adjusted = np.ones(len(values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * np.arange(len(order), 0, -1)))
    return adjusted


def ranks(better: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is known of the ranks of m models.

    Args:
        better: (m, m) whether the row is shown to be better than the column.

    Returns:
        (m,) rank: one more than the number of models that are shown to be better, the best place that is possible;
        (m,) the worst place that is possible; and (m,) the group, from 1. Models that cannot be told apart share a
        group, and each model of a group is shown to be better than every model of the groups after it.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    m = len(better)
    best, worst = 1 + better.sum(axis=0), m - better.sum(axis=1)
    if m == 0:
        return best, worst, np.zeros(0, dtype=int)
    _, part = connected_components(csr_array(~better.T), directed=True, connection="strong")
    before = (better & (part[:, None] != part[None, :])).sum(axis=0)
    return best, worst, np.unique(before, return_inverse=True)[1] + 1
