"""What a method costs over DPO: steps on the same batches, taken in turns in one process.

    make bench-methods SHAPE=30m-long ARGS="--methods otpo simpo tdpo2 --steps 20"

The ratio of each step to DPO's on the same pairs: median and quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics

from otpo.methods import FROZEN_MODELS, METHODS
from tests.benchmarks.shapes import SHAPES
from tests.benchmarks.turns import counted, ratios


def main(arguments: list[str]) -> None:
    """Print each method's ratio, then all figures as one JSON line."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks methods", description=__doc__)
    parser.add_argument("shape", nargs="?", default="30m-short", choices=SHAPES)
    parser.add_argument("--steps", type=int, default=20)
    known = [
        name for name, method in METHODS.items() if method.objective == "pair" and not method.needs & set(FROZEN_MODELS)
    ]
    parser.add_argument("--methods", nargs="+", choices=known, default=["otpo", "simpo", "sampo", "wpo"])
    options = parser.parse_args(arguments)

    from tests.benchmarks.ours import Ours, interleaved, one_worker, steps_of

    found = {}
    with one_worker() as mesh:
        work = steps_of(SHAPES[options.shape], options.steps)
        names = ["dpo", *options.methods]
        steps = {name: Ours(SHAPES[options.shape], mesh, work, name).step for name in names}
        seconds = interleaved(steps, options.steps)
    numbers = counted(options.steps)
    for name in names:
        step = statistics.median(seconds[name][number] for number in numbers)
        over = ratios(seconds[name], seconds["dpo"], numbers)
        found[name] = {"step_seconds": step, "over_dpo": over}
        print(
            f"{name:>12}  step {step:7.3f} s  {over['median']:5.2f} x DPO ({over['low']:.2f} to {over['high']:.2f})",
            flush=True,
        )
    print(json.dumps({"benchmark": "methods", "shape": options.shape, "steps": options.steps, "methods": found}))
