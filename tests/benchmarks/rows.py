"""Memory and time of a large data set, on the driver and on a training worker: how both grow with its rows.

    make bench-rows ARGS="--rows 20000 100000"

Synthetic pairs as long as UltraFeedback's (about 250 tokens of prompt, 300 of each completion), in a JSON lines file.
The driver tokenises it (`prepare_tokens`). A worker opens the token ids and the reference's log-probabilities, finds
nothing missing, and reads the items of a few steps. Memory is counted as the kernel does: anonymous memory belongs to
the process alone; pages of mapped files are shared by the workers of a machine, and dropped when memory is short.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from otpo.kernels.cpu.allocator import ALLOCATOR

SHAPE = {"prompt": 250, "chosen": 300, "rejected": 300}  # words of a row, on average
ROOT = Path(__file__).resolve().parents[2]
STEPS = 50
BATCH = 128


def main(arguments: list[str]) -> None:
    """Print what driver and worker take for each number of rows, then all figures as one JSON line."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks rows", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[5_000, 25_000])
    parser.add_argument("--shorter", type=int, default=1, help="rows this many times shorter")
    options = parser.parse_args(arguments)
    found: dict[str, list[dict[str, float]]] = {"driver": [], "worker": []}
    for count in options.rows:
        for side, figures in measure(count, options.shorter).items():
            found[side].append({"rows": count} | figures)
            print(_line(side, found[side]), flush=True)
    print(json.dumps({"benchmark": "rows", "shorter": options.shorter, **found}))


def measure(count: int, shorter: int) -> dict[str, dict[str, float]]:
    """What each side takes for a number of rows, in a process of its own: bytes of memory and seconds."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), count, shorter)
        for side in ("driver", "worker"):
            call = f"from tests.benchmarks.rows import {side}, print_figures; print_figures({side}, {folder!r})"
            # not the allocator settings of training, which keep what is freed
            plain = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
            done = subprocess.run([sys.executable, "-c", call], env=plain, stdout=subprocess.PIPE, check=True, cwd=ROOT)
            found[side] = json.loads(done.stdout.splitlines()[-1])
    return found


def _line(side: str, figures: list[dict[str, float]]) -> str:
    last = figures[-1]
    text = (
        f"{side:>7} {last['rows']:>9,.0f} rows: {last['anonymous'] / 2**20:7,.0f} MiB, of mapped files"
        f" {last['mapped'] / 2**20:7,.0f} MiB, {last['seconds']:7.1f} s"
    )
    if len(figures) > 1:
        before = figures[-2]
        rows = last["rows"] - before["rows"]
        text += f"; {(last['anonymous'] - before['anonymous']) / rows:7,.0f} bytes for each further row"
    return text


# ---- the data ----


def write_data(folder: Path, count: int, shorter: int = 1) -> None:
    """Write `pairs.jsonl` and a model folder whose tokenizer makes about one token of a word."""
    from otpo.models.fresh import fresh

    draw = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(letters[draw.integers(0, 26, 5)]) for _ in range(2_000)])

    def text(mean: int) -> str:
        length = int(draw.integers(mean // 2, mean + mean // 2))
        return " ".join(words[draw.integers(0, len(words), max(2, length // shorter))])

    with (folder / "pairs.jsonl").open("w") as file, (folder / "sample.jsonl").open("w") as sample:
        for number in range(count):
            row = json.dumps({name: f"{number} {text(mean)}" for name, mean in SHAPE.items()}) + "\n"
            file.write(row)
            if number < 500:
                sample.write(row)
    fresh(folder / "sample.jsonl", folder / "model", hidden=32, layers=1, heads=1, kv_heads=1)


# ---- the two sides ----


class Peak:
    """The largest memory of this process while the body runs, in bytes."""

    def __enter__(self) -> Peak:
        self.anonymous = self.mapped = 0
        self.started, self.over = time.perf_counter(), threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.over.wait(0.02):
            self._look()

    def _look(self) -> None:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        self.anonymous = max(self.anonymous, int(lines["RssAnon"].split()[0]) * 1024)
        self.mapped = max(self.mapped, int(lines["RssFile"].split()[0]) * 1024)

    def __exit__(self, *exception: object) -> None:
        self.over.set()
        self.thread.join()
        self._look()

    def figures(self) -> dict[str, float]:
        """Plain values for JSON."""
        seconds = time.perf_counter() - self.started
        return {"anonymous": self.anonymous, "mapped": self.mapped, "seconds": round(seconds, 2)}


def driver(folder: Path) -> dict[str, float]:
    """Tokenise the pairs, as a run does before it starts."""
    from otpo.data.token_file import load_tokens
    from pipeline.recipe import make_recipe
    from pipeline.train.frozen_cache import _write_part
    from pipeline.train.tokens import prepare_tokens

    source, model = str(folder / "pairs.jsonl"), str(folder / "model")
    recipe = make_recipe({"name": "rows", "model": {"path": model}, "data": {"path": source}, "methods": {"dpo": {}}})
    with Peak() as peak:
        tokens = prepare_tokens(recipe, folder / "run", model=model, source=source, supervised=False)
    figures = peak.figures()
    files = [tokens.train, tokens.validation]
    (folder / "tokens.json").write_text(json.dumps(files))
    (folder / "cache").mkdir()
    for file in files:  # what the reference's pass leaves; here all zeros
        items: Any = load_tokens(file or "")
        for start in range(0, len(items), 512):
            members = items[start : start + 512]
            _write_part(folder / "cache", {p.row: (zeros(p.chosen_ids), zeros(p.rejected_ids)) for p in members})
    return figures


def zeros(ids: list[int]) -> np.ndarray:
    """A log-probability for each token."""
    return np.zeros(len(ids), dtype=np.float32)


def worker(folder: Path) -> dict[str, float]:
    """What a rank holds of the data beside the model: token ids, cached log-probabilities, the order of an epoch."""
    from otpo.data.sampler import next_indices
    from otpo.data.token_file import Joined, load_tokens
    from otpo.training.objectives.pair import pair_prompts
    from pipeline.train.frozen_cache import FrozenLogProbs

    files = json.loads((folder / "tokens.json").read_text())
    with Peak() as peak:
        items, validation = map(load_tokens, files)
        cache = FrozenLogProbs(folder / "cache")
        assert not len(cache.missing(pair_prompts(Joined(items, validation))))
        for step in range(STEPS):
            indices = next_indices(len(items), seed=0, consumed=step * BATCH, count=BATCH)
            members = [items[index] for index in indices]
            assert all(len(cache.rows[member.row][0]) == len(member.chosen_ids) for member in members)
    return peak.figures()


def print_figures(side: Callable[[Path], dict[str, float]], folder: str) -> None:
    """Run one side in this process, which should be a fresh one."""
    print(json.dumps(side(Path(folder))))
