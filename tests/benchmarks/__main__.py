"""Every benchmark, one after the other; `ARGS="step 30m-short"` picks one and its shape. Each ends with one JSON line.

make bench
make bench ARGS="step 30m-long --steps 12"
"""

from __future__ import annotations

import os
import sys

from otpo.kernels.cpu.allocator import ALLOCATOR
from tests.benchmarks import board, coverage, growth, loading, memory, methods, profile, rows, step
from tests.benchmarks.disk import saving
from tests.benchmarks.overhead import client, ray_cost

BENCHMARKS = {
    "step": step.main,
    "methods": methods.main,
    "profile": profile.main,
    "growth": growth.main,
    "rows": rows.main,
    "memory": memory.main,
    "coverage": coverage.main,
    "loading": loading.main,
    "board": board.main,
    "client": client.main,
    "saving": saving.main,
    "ray": ray_cost.main,
}

if __name__ == "__main__":
    if not ALLOCATOR.items() <= os.environ.items():  # the allocator reads it when a process begins
        os.execve(sys.executable, [sys.executable, "-m", "tests.benchmarks", *sys.argv[1:]], os.environ | ALLOCATOR)
    chosen = sys.argv[1:2] or list(BENCHMARKS)
    for name in chosen:
        BENCHMARKS[name](sys.argv[2:])
