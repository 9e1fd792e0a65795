"""Where the seconds of a finished run went: into the work of each stage, and into what starts and ends it.

python -m tests.benchmarks stages runs/small_world

The work of training is its steps, that of sampling and generation the tokens; of other stages it is all. The rest is
worker groups and engines that start, models that are read, caches, checks, evaluations and what is saved.
"""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.run.folder import RunFolder


def main(arguments: list[str]) -> None:
    """Print a table of the stages, then all figures as one JSON line."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks stages", description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/small_world"))
    run = RunFolder(parser.parse_args(arguments).run)
    if not run.manifest.exists():
        print(f"{run.path} holds no run: `make run` makes one.")
        return
    stages = json.loads(run.manifest.read_text())["stages"]
    rows: dict[str, dict[str, float]] = {}
    for stage, record in stages.items():
        seconds = float(record["seconds"])
        # labels that a worker group trains in turn share what starts it
        row = rows.setdefault(stage.partition("/")[0], {"seconds": 0.0, "work": 0.0})
        row["seconds"] += seconds
        row["work"] += min(_work(run, stage, seconds), seconds)
    for stage, row in rows.items():
        row["rest"] = row["seconds"] - row["work"]
        print(f"{stage:10} {row['seconds']:7.1f} s   work {row['work']:7.1f}   rest {row['rest']:6.1f}")
    between = _span(list(stages.values())) - sum(row["seconds"] for row in rows.values())
    print(f"between stages {max(between, 0.0):.1f} s")  # `finished` is in whole seconds
    print(json.dumps({"benchmark": "stages", "stages": rows, "between": between}))


def _work(run: RunFolder, stage: str, seconds: float) -> float:
    """Seconds of a stage's own work."""
    kind, _, rest = stage.partition("/")
    if kind in ("base", "train"):
        lines = run.label(rest or "base").metrics.read_text().splitlines()
        return float(sum(json.loads(line).get("seconds", 0.0) for line in lines))
    if kind == "pairs":
        return sum(_generating(path) for path in run.pairs.parent.glob("*.samples/generation.json"))
    if kind == "generate":
        label, _, task = rest.partition("/")
        return _generating(run.label(label).generation(task) / "generation.json")
    return seconds


def _generating(path: Path) -> float:
    report = json.loads(path.read_text())
    return float(report["tokens"] / report["tokens_per_second"])


def _span(stages: list[dict[str, Any]]) -> float:
    """Seconds from the beginning of the first stage to the end of the last."""
    ends = [datetime.fromisoformat(stage["finished"]).timestamp() for stage in stages]
    return ends[-1] - (ends[0] - stages[0]["seconds"])
