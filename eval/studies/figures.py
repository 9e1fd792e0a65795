"""What one run says of each label: its board, and what a known truth allowed to measure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from eval import layout
from eval.board.leaderboard import read_leaderboard

PARTS = ("trained", "held_out")
BOARD = ("win_rate", "length_adjusted_winrate", "avg_length")


def run_figures(folder: Path, labels: Sequence[str]) -> pd.DataFrame:
    """The figures of a run's labels.

    Args:
        folder: of a run.
        labels: those that are wanted.

    Returns:
        A row for each label and figure, with the columns label, figure and value. Figures of a task are named
        "TASK: win_rate"; those of a known truth "right, trained", "words, held_out" and "weight AUC" (of labels that
        weight tokens unevenly). Accuracies are in percent.
    """
    rows = [*_of_truth(folder, labels), *_of_board(folder, labels)]
    return pd.DataFrame(rows, columns=["label", "figure", "value"])


def _of_board(folder: Path, labels: Sequence[str]) -> Iterator[tuple[str, str, float]]:
    path = folder / layout.LEADERBOARD
    if not path.exists():
        return
    board = read_leaderboard(path)
    against_labels = board["reference"].isin([label for label in labels if label != "base"])
    for row in board[~against_labels & board["name"].isin(labels)].to_dict("records"):
        for figure in BOARD:
            if pd.notna(row.get(figure)):
                yield str(row["name"]), f"{row['task']}: {figure}", float(row[figure])


def _of_truth(folder: Path, labels: Sequence[str]) -> Iterator[tuple[str, str, float]]:
    path = folder / layout.KNOWN_TRUTH
    if not path.exists():
        return
    truth: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for label in labels:
        for part in PARTS:
            if accuracy := truth["accuracy"].get(label, {}).get(part):
                yield label, f"right, {part}", 100 * float(accuracy["value"])
            if (words := truth["words"].get(label, {}).get(part)) is not None:
                yield label, f"words, {part}", float(words)
    for row in truth["deciding_token"]:
        if row["label"] in labels and row["auc"] is not None:
            yield row["label"], "weight AUC", float(row["auc"])
