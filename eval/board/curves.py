"""Training curves: small multiples of the metrics that training logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from eval.board.figures import INK, Style, empty_figure, svg

# Metrics in the order of the panels, with their titles.
CURVES = {
    "loss": "Loss",
    "rewards/accuracies": "Reward accuracy",
    "rewards/margins": "Reward margin",
    "rewards/chosen": "Reward of chosen",
    "rewards/rejected": "Reward of rejected",
    "weights/entropy_chosen": "Weight entropy, chosen",
    "weights/entropy_rejected": "Weight entropy, rejected",
    "weights/transport_mass": "Transport mass",
    "lengths/chosen": "Tokens of chosen",
    "lengths/rejected": "Tokens of rejected",
    "grad_norm": "Gradient norm",
    "logps/chosen": "Log-probability of chosen",
}
MAX_CURVES = 12


def training_curves(
    metrics: Mapping[str, pd.DataFrame], looks: Mapping[str, Style]
) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    """The panels and the table of last values that the page shows.

    Args:
        metrics: label -> the lines of its metrics.jsonl, with the column `step`.
        looks: label -> its style.

    Returns:
        Rows {title, svg}, one a metric, at most MAX_CURVES; and rows {label, steps, cells}, one a label: its last step
        and the mean of the last tenth of each metric.
    """
    extra = sorted({str(c) for frame in metrics.values() for c in frame if str(c).startswith("weights/")} - set(CURVES))
    titles = CURVES | {key: key.replace("/", ": ").replace("_", " ").capitalize() for key in extra}
    keys = [key for key in titles if any(key in f and f[key].notna().any() for f in metrics.values())][:MAX_CURVES]
    panels = [{"title": titles[key], "svg": _curve(key, titles[key], metrics, looks)} for key in keys]
    values = []
    for label, frame in metrics.items():
        tail = {key: frame[key].dropna() if key in frame else pd.Series(dtype=float) for key in keys}
        cells = [float(v.tail(max(1, len(v) // 10)).mean()) if len(v) else None for v in tail.values()]
        values.append({"label": label, "steps": frame["step"].max(), "cells": cells})
    return panels, values


def _curve(
    key: str, title: str, metrics: Mapping[str, pd.DataFrame], looks: Mapping[str, Style], width: int = 330
) -> str:
    """One metric over the steps: a line a label, smoothed if there are many steps; rings are evaluations."""
    figure, axes = empty_figure(width, round(0.62 * width))
    for label, frame in metrics.items():
        look = looks[label]
        if key in frame:
            line = frame[["step", key]].dropna()
            window = max(1, len(line) // 30)
            smooth = line[key].rolling(window, min_periods=1, center=True).mean()
            if window > 1:
                axes.plot(line["step"], line[key], color=look.colour, linewidth=0.8, alpha=0.18)
            dash = tuple(float(d) for d in look.dash.split())
            axes.plot(line["step"], smooth, color=look.colour, linewidth=1.8, linestyle=(0, dash or None))
        if f"eval_{key}" in frame:
            line = frame[["step", f"eval_{key}"]].dropna()
            ring = {"markerfacecolor": "white", "markeredgecolor": look.colour, "markersize": 6, "linestyle": "none"}
            axes.plot(line["step"], line[f"eval_{key}"], marker=look.marker, **ring)  # type: ignore[arg-type]
    axes.set_xlabel("step", fontsize=12, color=INK)
    axes.tick_params(labelsize=11)
    axes.margins(x=0.02)
    axes.locator_params(nbins=5)
    return svg(figure, f"{title} over the training steps of {', '.join(metrics)}; last values are in the table below.")
