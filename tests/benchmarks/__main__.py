"""Every benchmark, one after the other; `ARGS="step 30m-short"` picks one and its shape. Each ends with one JSON line.

make bench
make bench ARGS="step 30m-long --steps 12"
"""

from __future__ import annotations

import importlib
import os
import sys

from otpo.kernels.cpu.allocator import ALLOCATOR

# Each is imported when it runs: those of a step must run on a GPU machine that has torch and transformers alone.
BENCHMARKS = {
    "step": "step",
    "methods": "methods",
    "profile": "profile",
    "growth": "growth",
    "rows": "rows",
    "memory": "memory",
    "coverage": "coverage",
    "loading": "loading",
    "board": "board",
    "client": "overhead.client",
    "saving": "disk.saving",
    "ray": "overhead.ray_cost",
    "stages": "overhead.stages",
}

if __name__ == "__main__":
    if not ALLOCATOR.items() <= os.environ.items():  # the allocator reads it when a process begins
        os.execve(sys.executable, [sys.executable, "-m", "tests.benchmarks", *sys.argv[1:]], os.environ | ALLOCATOR)
    chosen = sys.argv[1:2] or list(BENCHMARKS)
    for name in chosen:
        importlib.import_module(f"tests.benchmarks.{BENCHMARKS[name]}").main(sys.argv[2:])
