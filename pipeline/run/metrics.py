"""Reading the `metrics.jsonl` that training writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
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


def nearly_uniform(metrics: Mapping[str, Path]) -> list[str]:
    """A sentence for each label whose transport hardly told tokens apart.

    Args:
        metrics: label -> its `metrics.jsonl`.
    """
    import pandas as pd

    from eval.board.effective_tokens import run_sentence

    found = (run_sentence(label, pd.DataFrame(read_metrics(file))) for label, file in metrics.items())
    return [sentence for sentence in found if sentence]


def seconds_of_steps(metrics: Path) -> float:
    """Time that a label's own steps took: methods of one worker group share its start-up in this proportion."""
    return sum(line.get("seconds", 0.0) for line in read_metrics(metrics))


def read_metrics(metrics: Path) -> list[dict[str, Any]]:
    """The lines of a label's `metrics.jsonl`."""
    return [json.loads(line) for line in metrics.read_text().splitlines()]
