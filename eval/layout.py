"""The files of a run's folder that the evaluation reads or writes: each name and place is spelled here, once.

    <folder>/recipe.yaml  manifest.json  weights.json  world.json  verdicts.parquet  leaderboard.csv  report.html
    <folder>/models/<label>/metrics.jsonl
    <folder>/models/<label>/<task>/model_outputs.json
    <folder>/judge/<task>/verdicts.parquet  reference.json

`otpo judge --out` and `otpo sweep` write the same files into a folder of their own, with the verdicts of all tasks at
its top. `pipeline.run.folder` adds what the other stages write.
"""

from __future__ import annotations

from pathlib import Path

RECIPE = "recipe.yaml"
MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
OUTPUTS = "model_outputs.json"
VERDICTS = "verdicts.parquet"
REFERENCE = "reference.json"
WEIGHTS = "weights.json"
KNOWN_TRUTH = "world.json"
LEADERBOARD = "leaderboard.csv"
REPORT = "report.html"
STORE = "store.sqlite"

MODELS = "models"
JUDGE = "judge"


def label_folder(folder: Path, label: str) -> Path:
    """Everything of one model: `models/<label>`."""
    return folder / MODELS / label


def outputs_file(folder: Path, label: str, task: str) -> Path:
    """What a model generated for a task, in AlpacaEval's own format."""
    return label_folder(folder, label) / task / OUTPUTS


def verdicts_file(folder: Path, task: str) -> Path:
    """The verdicts of a task."""
    return folder / JUDGE / task / VERDICTS


def reference_file(folder: Path, task: str) -> Path:
    """The outputs that a task's verdicts compare with, in AlpacaEval's own format."""
    return folder / JUDGE / task / REFERENCE
