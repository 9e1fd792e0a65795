"""The tables of a study, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from eval.studies.seeds import Mean, by_label, differences

WORDS = {
    "right, trained": "right on trained entities, %",
    "right, held_out": "right on held-out entities, %",
    "words, trained": "words an output, trained entities",
    "words, held_out": "words an output, held-out entities",
    "weight AUC": "AUC of the deciding token's weight",
    "win_rate": "judged win rate, %",
    "length_adjusted_winrate": "length-adjusted win rate, %",
    "avg_length": "characters an output",
}
DIGITS = {"weight AUC": 2, "avg_length": 0}
TRANSPORT = "otpo"
"""Beginning of the labels whose differences from the others are shown, where there is one; else it is the last."""


def study_text(name: str, table: pd.DataFrame, tuned: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The page of a study.

    Args:
        name: of the study.
        table: columns regime, seed, label, figure, value.
        tuned: regime -> label -> the values that it was tuned to.
    """
    lines = [f"# {name}", ""]
    for regime, frame in table.groupby("regime", sort=False):
        values = tuned[str(regime)]
        seeds = frame["seed"].nunique()
        lines += [f"## {regime}", "", *_values(values), ""]
        lines += [
            f"Means over {seeds} training seeds, with 95 % intervals over the seeds (Student's t). There is none where"
            " all seeds have the same figure.",
            "",
        ]
        lines += [*_means(frame), ""]
        labels = list(values)
        focus = next((label for label in labels if label.startswith(TRANSPORT)), labels[-1])
        others = [label for label in labels if label != focus]
        if others:
            lines += [
                f"What {focus} has more than each of the others, seed by seed. An interval without 0 is more than what"
                " another seed would have done.",
                "",
                *_differences(frame, focus, others),
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


def _values(values: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = [[label, ", ".join(f"{key} {_plain(value)}" for key, value in own.items())] for label, own in values.items()]
    return _table(["method", "tuned to"], rows)


def _means(frame: pd.DataFrame) -> list[str]:
    means, labels = by_label(frame), list(dict.fromkeys(frame["label"]))
    rows = [
        [_words(figure), *(_cell(means.get((label, figure)), figure) for label in labels)] for figure in _figures(frame)
    ]
    return _table(["", *labels], rows)


def _differences(frame: pd.DataFrame, focus: str, others: Sequence[str]) -> list[str]:
    found = {other: differences(frame, focus, other) for other in others}
    figures = [figure for figure in _figures(frame) if any(figure in each for each in found.values())]
    rows = [[_words(figure), *(_cell(found[other].get(figure), figure, "+") for other in others)] for figure in figures]
    return _table(["", *(f"against {other}" for other in others)], rows)


def _figures(frame: pd.DataFrame) -> list[str]:
    """Known figures in the order of `WORDS`, those of a task together."""
    order = list(WORDS)
    found = list(dict.fromkeys(frame["figure"]))
    tasks = list(dict.fromkeys(figure.rpartition(": ")[0] for figure in found))
    return sorted(found, key=lambda figure: (tasks.index(figure.rpartition(": ")[0]), order.index(_base(figure))))


def _base(figure: str) -> str:
    return figure.rpartition(": ")[2]


def _words(figure: str) -> str:
    task, _, base = figure.rpartition(": ")
    return f"{task}: {WORDS[base]}" if task else WORDS[base]


def _cell(mean: Mean | None, figure: str, sign: str = "") -> str:
    if mean is None:
        return ""
    digits = DIGITS.get(_base(figure), 1)
    value = f"{mean.value:{sign}.{digits}f}"
    if mean.low is None or mean.high is None:
        return value
    return f"{value} ({mean.low:.{digits}f} to {mean.high:.{digits}f})"


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
