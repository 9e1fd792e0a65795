"""The pictures of a sweep, in the page's style: the front of two objectives, and trials as parallel coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from eval.board.figures import COLOURS, INK, NEUTRAL, empty_figure, svg
from eval.front import on_front
from eval.sweeps.importance import is_logarithmic, is_numeric

MOST_TICKS = 6


def front_picture(trials: pd.DataFrame, objectives: Mapping[str, str], width: int = 700, height: int = 400) -> str:
    """The first two objectives against each other, the front joined by steps.

    Args:
        trials: a row a trial, with the column `trial`.
        objectives: column -> "min" or "max"; the first is drawn upwards.
    """
    (up, up_mode), (across, across_mode) = list(objectives.items())[:2]
    rows = trials.dropna(subset=[up, across])
    figure, axes = empty_figure(width, height)
    front = rows[on_front(rows, {up: up_mode, across: across_mode})].sort_values(across)
    others = rows.drop(front.index)
    axes.plot(others[across], others[up], "o", color=NEUTRAL, markersize=7, alpha=0.7)
    side = "post" if (up_mode == "max") == (across_mode == "min") else "pre"
    axes.step(front[across], front[up], where=side, color=COLOURS[0], linewidth=1.2, alpha=0.6)  # type: ignore[arg-type]
    axes.plot(front[across], front[up], "o", color=COLOURS[0], markersize=9)
    for row in front.to_dict("records"):
        place: Any = {"xytext": (6, 6), "textcoords": "offset points", "fontsize": 11, "color": COLOURS[0]}
        axes.annotate(_plain(row["trial"]), (row[across], row[up]), **place)
    axes.set_xlabel(f"{_words(across)} ({_better(across_mode)})", fontsize=13, color=INK)
    axes.set_ylabel(f"{_words(up)} ({_better(up_mode)})", fontsize=13, color=INK)
    axes.margins(x=0.25, y=0.1)
    said = "; ".join(f"{row['trial']} {row[up]:.4g} at {row[across]:.4g}" for row in front.to_dict("records"))
    return svg(figure, f"{_words(up)} against {_words(across)}. On the front: {said}. The table has all numbers.")


def parallel_coordinates(
    trials: pd.DataFrame, keys: Mapping[str, str], objectives: Mapping[str, str], width: int = 1000, height: int = 380
) -> str:
    """A line a trial through one axis for each key and objective; the better by the first objective, the darker.

    Args:
        trials: a row a trial, the best first, with the column `trial`.
        keys: swept column -> its short name.
        objectives: column -> "min" or "max".
    """
    from matplotlib import colormaps

    columns = {**keys, **{name: _words(name) for name in objectives}}
    rows = trials.dropna(subset=list(columns)).reset_index(drop=True)
    if len(rows) < 2:
        return ""
    figure, axes = empty_figure(width, height)
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)
    places = np.stack([_place(axes, x, rows[column]) for x, column in enumerate(columns)], axis=1)
    shades = colormaps["Blues"](np.linspace(0.95, 0.25, len(rows)))
    for number in reversed(range(len(rows))):  # the best on top
        best = number == 0
        colour = COLOURS[1] if best else shades[number]
        axes.plot(range(len(columns)), places[number], color=colour, linewidth=2.6 if best else 1.3, alpha=0.9)
    for x in range(len(columns)):
        axes.axvline(x, color=NEUTRAL, linewidth=1)
    axes.set_xticks(range(len(columns)), [_plain(name) for name in columns.values()], fontsize=12, color=INK)
    axes.set_yticks([])
    axes.set_xlim(-0.15, len(columns) - 0.5)
    axes.set_ylim(-0.06, 1.06)
    names = ", ".join(columns.values())
    return svg(
        figure, f"Each trial as a line over {names}; the best, {rows['trial'][0]}, in orange. The table has all."
    )


def _place(axes: Any, x: int, values: pd.Series) -> np.ndarray:
    """Write an axis's ticks at `x`; gives the height of each value on it, from 0 to 1."""
    if is_numeric(values):
        scale = np.log if is_logarithmic(values) else np.asarray
        found = np.asarray(scale(values.to_numpy(float)))
        tried = sorted(values.unique())
        chosen = tried if len(tried) <= MOST_TICKS else [tried[0], tried[-1]]
        ticks = {f"{value:.4g}": float(scale(value)) for value in chosen}
    else:
        words = list(dict.fromkeys(values.astype(str)))
        found = values.astype(str).map(words.index).to_numpy(float)
        ticks = {word: float(number) for number, word in enumerate(words)}
    low, high = found.min(), found.max()
    span = (high - low) or 1.0
    for text, value in ticks.items():
        place = (value - low) / span if high > low else 0.5
        axes.annotate(
            _plain(text), (x, place), xytext=(5, 2), textcoords="offset points", fontsize=11, color=NEUTRAL,
        )  # fmt: skip
    return (found - low) / span if high > low else np.full(len(found), 0.5)


def _plain(text: Any) -> str:
    """A text that matplotlib does not take for mathematics."""
    return str(text).replace("$", r"\$")


def _words(name: str) -> str:
    return name.removeprefix("eval_").replace("_", " ").replace("/", ", ")


def _better(mode: str) -> str:
    return "more is better" if mode == "max" else "less is better"


def headings(names: Sequence[str]) -> list[str]:
    """Columns as words."""
    return [_words(name).capitalize() for name in names]
