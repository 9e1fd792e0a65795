"""Runs of the command that trackers follow, and what each tracker then holds against the run's own files."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking.mirror import tracker_names
from pipeline.tracking.trackers import TRACKERS
from support.trackers.files import Curves, of_mlflow, of_tensorboard, of_trackio, of_wandb

# Trackio reads it when it is imported.
STORE = os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio")
os.environ["WANDB_MODE"] = "offline"

ROOT = Path(__file__).resolve().parents[3]
SECRET = "5ecret" * 7  # as long as a key of W&B


def command(*arguments: str) -> list[Any]:
    """Arguments for subprocess: the command `otpo` with these arguments."""
    return [sys.executable, "-m", "jobs.cli", *arguments]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_API_KEY": SECRET, **more}


def held(folder: Path, project: str, label: str, known: Path) -> dict[str, Curves]:
    """Tracker -> what it holds of a label."""
    runs = json.loads(known.read_text())
    assert runs.keys() == TRACKERS.keys()
    return {
        "tensorboard": of_tensorboard(folder, label),
        "mlflow": of_mlflow(folder, runs["mlflow"]["run"]),
        "wandb": of_wandb(folder, runs["wandb"]["run"])[0],
        "trackio": of_trackio(project, label),
    }


def curves_of(file: Path) -> Curves:
    """What a metrics.jsonl holds, under the trackers' names."""
    found: Curves = {}
    for line in map(json.loads, file.read_text().splitlines()):
        for name, value in tracker_names(line).items():
            found.setdefault(name, []).append((line["step"], value))
    return found


def same(found: Curves, expected: Curves, **tolerance: float) -> None:
    """Every metric, every step once and in order, every value."""
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        values = [value for _, value in found[name]]
        assert values == pytest.approx([value for _, value in points], nan_ok=True, **tolerance), name


def until(condition, seconds: float = 120) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s"
        time.sleep(0.1)
