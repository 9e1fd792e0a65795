"""Reading the `metrics.jsonl` that training writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def newest_step(metrics: Path) -> dict[str, Any] | None:
    """The last complete training line of a `metrics.jsonl`, read from its end."""
    if not metrics.exists():
        return None
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").split("\n")[:-1]
    for text in reversed(lines):
        if text.startswith("{") and '"loss"' in text:
            return json.loads(text)
    return None


def nearly_uniform(folder: Path, labels: list[str]) -> list[str]:
    """A sentence for each label of a run whose transport hardly told tokens apart, by its logged metrics."""
    import pandas as pd

    from eval.board.effective_tokens import run_sentence

    found = (run_sentence(label, pd.DataFrame(metrics_of(folder / "models" / label))) for label in labels)
    return [sentence for sentence in found if sentence]


def seconds_of_steps(folder: Path) -> float:
    """Time that a label's own steps took: methods of one worker group share its start-up in this proportion."""
    return sum(line.get("seconds", 0.0) for line in metrics_of(folder))


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a label's `metrics.jsonl`."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
