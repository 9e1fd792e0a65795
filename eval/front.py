"""The Pareto front: rows of a table that no other row beats."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd


def on_front(table: pd.DataFrame, objectives: Mapping[str, str]) -> np.ndarray:
    """(n,) whether no other row is as good in every objective and better in one.

    Equal rows do not beat each other. A row without a figure is never on the front.

    Args:
        table: a row a trial or a model.
        objectives: column -> "min" or "max".
    """
    signs = np.array([1.0 if mode == "min" else -1.0 for mode in objectives.values()])
    values = table[list(objectives)].to_numpy(float) * signs
    known = ~np.isnan(values).any(axis=1)
    as_good = (values[None] <= values[:, None]).all(axis=2)  # [i, j]: j is as good as i
    better = (values[None] < values[:, None]).any(axis=2)
    return known & ~(as_good & better).any(axis=1)
