"""Time and memory of a board: its table, its tests of all models against each other, its files and its pages.

    python -m tests.benchmarks board --models 200 --verdicts 100000

Models differ in strength, prompts in difficulty; one verdict in 500 is missing. Every model answers every prompt.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from eval.judge.config import JudgeConfig
from otpo.files import Row
from pipeline.judge.board import make_board, write_judged
from tests.benchmarks.rows import Peak

MISSING = 0.002
WORD = "benchmark "


def main(arguments: list[str]) -> None:
    """Print time (of the clock, and of the CPU) and peak memory of both parts, then all figures as one JSON line."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks board", description=__doc__)
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--verdicts", type=int, default=100_000)
    options = parser.parse_args(arguments)
    verdicts, outputs, reference = draw(options.models, options.verdicts // options.models)
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        with Peak() as begun:
            pass
        began = time.process_time()
        with Peak() as peak:
            board = make_board(verdicts, outputs, reference, JudgeConfig(model="judge"))
        figures["table"] = peak.figures() | {"cpu_seconds": round(time.process_time() - began, 1)}
        began = time.process_time()
        with Peak() as peak:
            write_judged(Path(folder), "bench", verdicts, board, outputs, reference)
        figures["pages"] = peak.figures() | {"cpu_seconds": round(time.process_time() - began, 1)}
        page = (Path(folder) / "report.html").stat().st_size
    for part, found in figures.items():
        added = (found["anonymous"] - begun.anonymous) / 2**20
        found["added_mib"] = round(added)
        times = f"{found['seconds']:7.1f} s, {found['cpu_seconds']:7.1f} s of CPU"
        print(f"{part:>6}: {times}, {added:7,.0f} MiB above the verdicts", flush=True)
    print(f"report.html: {page / 2**20:.1f} MiB")
    print(json.dumps({"benchmark": "board", **vars(options), "report_bytes": page, **figures}))


def draw(models: int, prompts: int) -> tuple[pd.DataFrame, dict[str, list[Row]], list[Row]]:
    """Verdicts as `judge_task` gives them, the models' outputs, and the reference's."""
    rng = np.random.default_rng(0)
    strength, difficulty = rng.normal(0, 0.8, models), rng.normal(0, 1.2, prompts)
    chance = 1 / (1 + np.exp(-(strength[:, None] + difficulty)))
    preference = 1 + rng.beta(0.4 * chance, 0.4 * (1 - chance))
    preference[rng.random(preference.shape) < MISSING] = np.nan
    words = rng.integers(5, 60, (models, prompts))
    names = [f"model-{number:03d}" for number in range(models)]
    questions = [f"Question {number}: what is to be measured?" for number in range(prompts)]
    outputs = {
        name: [_output(question, WORD * int(n), name) for question, n in zip(questions, words[i], strict=True)]
        for i, name in enumerate(names)
    }
    reference = [_output(question, WORD * 30, "reference") for question in questions]
    missing = np.isnan(preference).ravel()
    frame = pd.DataFrame(
        {
            "task": "bench",
            "generator": np.repeat(names, prompts),
            "reference": "reference",
            "index": np.tile(np.arange(prompts), models),
            "instruction": np.tile(questions, models),
            "instruction_hash": np.tile([f"{number:064x}" for number in range(prompts)], models),
            "reference_hash": np.tile([f"{number:064x}" for number in range(prompts)], models),
            "order": np.tile(rng.choice(["model_first", "reference_first"], prompts), models),
            "preference": preference.ravel(),
            "read": np.where(missing, None, "logprobs"),
            "error": np.where(missing, "timeout", None),
            "prompt_tokens": 900,
            "completion_tokens": 1,
            "price_usd": 0.009,
        }
    )
    return frame, outputs, reference


def _output(question: str, text: str, name: str) -> Row:
    return {"instruction": question, "output": text, "generator": name, "dataset": "bench"}


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
