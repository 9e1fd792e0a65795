"""How much of the differences between trials each hyperparameter explains."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pandas as pd

FEWEST_TRIALS = 8
"""A forest grown on fewer trials says nothing."""


def importances(trials: pd.DataFrame, keys: Sequence[str], figure: str) -> dict[str, float]:
    """The share of a figure's variance over the searched space that each key explains alone, by functional ANOVA.

    A random forest is fitted to the trials and its variance taken apart: Hutter, Hoos and Leyton-Brown (2014),
    http://proceedings.mlr.press/v32/hutter14.html. What is missing to 1 is explained by keys together.

    Args:
        trials: a row a trial; values of the keys are numbers or categories.
        keys: columns that were swept.
        figure: column that they explain.

    Returns:
        Key -> share in [0, 1], the largest first; empty for fewer than `FEWEST_TRIALS`, or where nothing differs.
    """
    import optuna

    known = trials.dropna(subset=[figure])
    varied = [key for key in keys if known[key].nunique() > 1]
    if len(known) < FEWEST_TRIALS or known[figure].nunique() < 2 or not varied:
        return {}
    space = {key: _distribution(known[key]) for key in varied}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    for row in known[[*varied, figure]].astype(object).to_dict("records"):
        params: dict[str, Any] = {str(key): row[key] for key in varied}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=float(row[figure])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # `normalize` may be renamed
        return optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0), normalize=False
        )


def is_numeric(values: pd.Series) -> bool:
    """Whether a key's values lie on a scale; booleans and words do not."""
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def is_logarithmic(values: pd.Series) -> bool:
    """Whether a key's values are shown, and explained, on a logarithmic scale: above 0 and over a factor of 10."""
    return is_numeric(values) and bool(values.min() > 0 and values.max() / values.min() >= 10)


def _distribution(values: pd.Series) -> Any:
    import optuna

    if not is_numeric(values):
        return optuna.distributions.CategoricalDistribution(list(dict.fromkeys(values)))
    low, high = float(values.min()), float(values.max())
    return optuna.distributions.FloatDistribution(low, high, log=is_logarithmic(values))
