"""The picture of a sweep's results: the metric against each swept key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from pipeline.sweep.search import Search

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEST, PLAIN = "#c2410c", "#1f5aa6"


def plot(parts: Sequence[tuple[pd.DataFrame, Search]]) -> Figure:
    """A row of axes for each label, one for each of its keys; ticks where values were tried.

    Args:
        parts: the results of each label, a row a trial, and what was searched.
    """
    from matplotlib.figure import Figure

    columns = max(len(search.space) for _, search in parts)
    figure = Figure(figsize=(4.2 * columns, 3.6 * len(parts)), layout="constrained")
    for row, (results, search) in enumerate(parts):
        done = results[results["state"] != "failed"].dropna(subset=[search.metric])
        for column, key in enumerate(search.space):
            axes = figure.add_subplot(len(parts), columns, row * columns + column + 1)
            _draw(axes, done, search, key, first=column == 0)
            if search.of_several and column == 0:
                axes.set_title(search.label, loc="left", fontsize="medium")
    return figure


def _draw(axes: Axes, done: pd.DataFrame, search: Search, key: str, *, first: bool) -> None:
    """The metric against one key, with the interval where there is one."""
    numeric = pd.api.types.is_numeric_dtype(done[key]) and not pd.api.types.is_bool_dtype(done[key])
    values = done[key] if numeric else done[key].astype(str)
    if search.metric == "win_rate" and "win_rate_low" in done:
        below, above = (
            (done["win_rate"] - done["win_rate_low"]).abs(),
            (done["win_rate_high"] - done["win_rate"]).abs(),
        )
        axes.errorbar(values, done["win_rate"], [below, above], fmt="none", ecolor="0.7", capsize=3)
        axes.axhline(50, color="0.6", linewidth=0.8, linestyle="--")
        place: dict[str, Any] = {
            "xycoords": ("axes fraction", "data"),
            "va": "bottom",
            "fontsize": "small",
            "color": "0.45",
        }
        level = "level with the trial before" if search.by_preference else "level with the reference"
        axes.annotate(level, (0.02, 50), **place)
    for state, marker in (("done", "o"), ("stopped", "x")):
        chosen = done["state"] == state
        axes.plot(values[chosen], done[search.metric][chosen], marker, color=PLAIN, label=state)
    best = done[done["state"] == "done"].head(1)
    axes.plot(values.loc[best.index], best[search.metric], "o", markersize=11, fillstyle="none", color=BEST)
    if numeric:
        tried = sorted(float(value) for value in values.unique())
        if tried and tried[0] > 0 and tried[-1] / tried[0] >= 10:
            axes.set_xscale("log")
        if len(tried) <= 8:
            axes.set_xticks(tried, [f"{value:g}" for value in tried])
            axes.minorticks_off()
    axes.set_xlabel(key)
    name = search.metric.replace("_", " ") if search.task else search.metric
    axes.set_ylabel(f"{name}{' (%)' if search.task else ''}" if first else "")
    axes.spines[["top", "right"]].set_visible(False)
    if (done["state"] == "stopped").any() and first:
        axes.legend(frameon=False, fontsize="small")
