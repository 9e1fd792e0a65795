"""Results of lm-evaluation-harness as columns of a board: a column for each task, metric and setting."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otpo.errors import UserError, first_line

LM_EVAL, ERROR = "lm_eval: ", "lm_eval stderr: "


@dataclass(frozen=True)
class Results:
    """One file of results.

    Attributes:
        model: what the file calls the model; empty where it does not say.
        values: column -> the figure, as it is in the file.
        errors: column -> its standard error, where there is one.
    """

    model: str
    values: dict[str, float]
    errors: dict[str, float]


def read_results(path: Path) -> Results:
    """Read a `results_*.json` of lm-evaluation-harness.

    A column names what decides a figure: task, metric, filter, shots, version, and how many of the task's samples were
    asked where it was a part. Figures with other settings are other columns.

    Raises:
        UserError: no such file, or not results of the harness.
    """
    try:
        tree = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"expected results of lm-evaluation-harness (JSON) at {path}, found nothing there.") from None
    except OSError as error:
        raise UserError(
            f"expected results of lm-evaluation-harness (JSON) at {path}, found what cannot be read: {error.strerror}."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {first_line(error)}") from None
    results = tree.get("results") if isinstance(tree, dict) else None
    if not isinstance(results, dict) or not all(isinstance(each, dict) for each in results.values()):
        raise UserError(f"{path}: expected results of lm-evaluation-harness, with figures of tasks under results.")
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for task, figures in results.items():
        for key, value in figures.items():
            metric, _, filtered = str(key).partition(",")
            number = _number(value)
            if number is None or metric in ("sample_len", "sample_count"):
                continue
            stderr = metric.endswith("_stderr")
            column = _column(tree, str(task), metric.removesuffix("_stderr"), filtered)
            (errors if stderr else values)[column] = number
    if not values:
        raise UserError(f"{path}: expected figures in results, found none.")
    return Results(_model(tree), values, {column: error for column, error in errors.items() if column in values})


def _column(tree: Mapping[str, Any], task: str, metric: str, filtered: str) -> str:
    parts = [f"{task} {metric}" + (f" {filtered}" if filtered not in ("", "none") else "")]
    shots, version, samples = (_of(tree, key, task) for key in ("n-shot", "versions", "n-samples"))
    if isinstance(shots, int):
        parts.append(f"{shots}-shot")
    if version not in (None, "N/A"):
        parts.append(f"version {version:g}" if isinstance(version, float) else f"version {version}")
    if isinstance(samples, dict) and samples.get("effective") != samples.get("original"):
        parts.append(f"{samples.get('effective')} of {samples.get('original')} samples")
    return ", ".join(parts)


def _of(tree: Mapping[str, Any], key: str, task: str) -> Any:
    found = tree.get(key)
    return found.get(task) if isinstance(found, dict) else None


def _model(tree: Mapping[str, Any]) -> str:
    if isinstance(name := tree.get("model_name"), str):
        return name
    arguments = (tree.get("config") or {}).get("model_args") if isinstance(tree.get("config"), dict) else None
    if isinstance(arguments, dict):
        return str(arguments.get("pretrained") or arguments.get("model") or "")
    named = dict(part.partition("=")[::2] for part in str(arguments or "").split(","))
    return named.get("pretrained") or named.get("model") or ""


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
