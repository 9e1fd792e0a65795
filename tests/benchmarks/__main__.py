"""Every benchmark, one after the other; `ARGS="step 30m-short"` picks one and its shape. Ends in one JSON line each.

make bench
make bench ARGS="step 30m-long --steps 12"
"""

from __future__ import annotations

import sys

from tests.benchmarks import step

BENCHMARKS = {"step": step.main}

if __name__ == "__main__":
    chosen = sys.argv[1:2] or list(BENCHMARKS)
    for name in chosen:
        BENCHMARKS[name](sys.argv[2:])
