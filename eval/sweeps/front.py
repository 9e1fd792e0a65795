"""The Pareto front of trials with several objectives."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd


def on_front(trials: pd.DataFrame, objectives: Mapping[str, str]) -> np.ndarray:
    """(n,) whether no other trial is as good in every objective and better in one. A trial without a figure never is.

    Args:
        trials: a row a trial.
        objectives: column -> "min" or "max".
    """
    signs = np.array([1.0 if mode == "min" else -1.0 for mode in objectives.values()])
    values = trials[list(objectives)].to_numpy(float) * signs
    known = ~np.isnan(values).any(axis=1)
    as_good = (values[None] <= values[:, None]).all(axis=2)  # [i, j]: j is as good as i
    better = (values[None] < values[:, None]).any(axis=2)
    return known & ~(as_good & better).any(axis=1)
