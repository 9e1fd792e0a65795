"""The files of a run's folder that the evaluation reads or writes: each name and place is spelled here, once.

    <folder>/recipe.yaml  manifest.json  weights.json  world.json  verdicts.parquet  report.html
    <folder>/leaderboard.csv  leaderboard.json  leaderboard.md
    <folder>/models/<label>/metrics.jsonl
    <folder>/models/<label>/<task>/model_outputs.json
    <folder>/judge/<task>/verdicts.parquet  reference.json

`otpo judge --out` and `otpo sweep` write the same files into a folder of their own, with the verdicts of all tasks at
its top, and a sweep writes sweep.json beside them. `otpo agreement --out` writes agreement.json and agreement.parquet,
into a board's folder too. A panel of judges leaves panel.json and panel/<judge>.parquet beside its verdicts, `otpo
rejudge` migration.json.
`pipeline.run.folder` adds what the other stages write.

Models and tasks may have any name; `folder_name` makes it one part of a path.
"""

from __future__ import annotations

import hashlib
import re
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
SWEEP = "sweep.json"
AGREEMENT = "agreement.json"
AGREEMENT_VERDICTS = "agreement.parquet"
PANEL = "panel"
PANEL_FIGURES = "panel.json"
MIGRATION = "migration.json"

MODELS = "models"
JUDGE = "judge"

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DIGEST = re.compile(r"-[0-9a-f]{12}$")


def folder_name(name: str) -> str:
    """A name as one part of a path: the same for the same name, different for any two, also without regard to case.

    A short name of small ASCII letters, digits, `.`, `_` and `-` stays as it is. Any other gets a part of its hash.
    """
    readable = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip(".-_")[:60]
    if name and readable == name and not _DIGEST.search(name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{readable.rstrip('.-_') or 'unnamed'}-{digest}"


def earlier_names(name: str) -> list[str]:
    """What earlier versions called the folder of this name: the name itself, or with a dash for odd characters."""
    return [name, re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "unnamed"]


def inside(folder: Path, name: str) -> Path:
    """The folder of a task in another one: by `folder_name`, or by its own name where an earlier version made it."""
    earlier = folder / name
    return earlier if _PLAIN.fullmatch(name) and earlier.is_dir() else folder / folder_name(name)


def label_folder(folder: Path, label: str) -> Path:
    """Everything of one model: `models/<label>`."""
    return folder / MODELS / label


def outputs_file(folder: Path, label: str, task: str) -> Path:
    """What a model generated for a task, in AlpacaEval's own format."""
    return inside(label_folder(folder, label), task) / OUTPUTS


def verdicts_file(folder: Path, task: str) -> Path:
    """The verdicts of a task."""
    return inside(folder / JUDGE, task) / VERDICTS


def reference_file(folder: Path, task: str) -> Path:
    """The outputs that a task's verdicts compare with, in AlpacaEval's own format."""
    return inside(folder / JUDGE, task) / REFERENCE
