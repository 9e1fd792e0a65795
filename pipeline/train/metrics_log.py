"""The one place where training logs a line of metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from otpo.files import write_atomically


class MetricsLog:
    """`metrics.jsonl` of one label: a line for each step and for each evaluation.

    Args:
        path: of the file.
        writes: whether this rank writes. Metrics are the same on every rank, so only rank 0 does.
    """

    def __init__(self, path: Path, *, writes: bool):
        self.path, self.writes = path, writes

    def log(self, line: dict[str, Any]) -> None:
        """Append a line.

        Args:
            line: "step" and numbers under TRL's names; those of an evaluation begin with `eval_`.
        """
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the lines after a step: training resumes there and logs them again. Makes the folder if needed."""
        if self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            # a killed process can leave half a line
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            write_atomically(self.path, "".join(f"{line}\n" for line in kept))
