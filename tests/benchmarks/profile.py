"""Where the time of our DPO step goes, and how far from the machine's matrix products it is.

    make bench-profile SHAPE=30m-long

After a warm-up, half of the steps are timed as they are and half run under torch's profiler. Shares are of each
operation's own time, on the GPU if there is one; the rest is Python, waiting and the profiler itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import TYPE_CHECKING

from tests.benchmarks.shapes import SHAPES

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEvent

# parts of the names of events above an operation, in lower case and without underscores
PARTS = {
    "attention": ("blockedattention", "scaleddotproduct"),
    "head": ("fusedlogprobs",),
    "optimizer": ("adamw", "foreachnorm", "vectornorm"),
}
PRODUCTS = ("aten::mm", "aten::addmm")
WARMUP = 4


def main(arguments: list[str]) -> None:
    """Print each part's seconds and share of the step, then all figures as one JSON line."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks profile", description=__doc__)
    parser.add_argument("shape", nargs="?", default="30m-short", choices=SHAPES)
    parser.add_argument("--steps", type=int, default=8, help="steps without the profiler, and as many with it")
    options = parser.parse_args(arguments)

    from torch.profiler import profile

    from tests.benchmarks.ours import STEP, Ours, one_worker, steps_of
    from tests.benchmarks.shapes import PAIRS
    from tests.benchmarks.step import floor

    shape = SHAPES[options.shape]
    total = WARMUP + 2 * options.steps
    with one_worker() as mesh:
        ours = Ours(shape, mesh, steps_of(shape, total))
        plain = [ours.step(number) for number in range(WARMUP + options.steps)][WARMUP:]
        seconds: dict[str, float] = {}
        profiled = 0.0
        for number in range(WARMUP + options.steps, total):
            with profile() as found:
                profiled += ours.step(number)
            events = found.events()
            span = next(event for event in events if event.name == STEP).time_range
            for event in events:
                if event.name.startswith("aten::") and span.start <= event.time_range.start <= span.end:
                    part = _part(event)
                    seconds[part] = seconds.get(part, 0.0) + _own_seconds(event)
    step = statistics.median(plain)
    shares = {part: value / profiled for part, value in sorted(seconds.items(), key=lambda item: -item[1])}
    shares["Python, waiting, the profiler"] = 1 - sum(shares.values())
    limits = floor(shape, shape.pairs(PAIRS * total))
    for part, share in shares.items():
        print(f"{part:>36}  {share:5.1%}  {share * step:7.3f} s")
    print(f"{'a step':>36}         {step:7.3f} s; its matrix products alone {limits['matmul_floor_seconds']:.3f} s")
    print(
        json.dumps({"benchmark": "profile", "shape": options.shape, "step_seconds": step, "shares": shares, **limits})
    )


def _part(event: FunctionEvent) -> str:
    names, above = [], event
    while above is not None:
        names.append(above.name.lower().replace("_", ""))
        above = above.cpu_parent
    part = next((part for part, words in PARTS.items() if any(word in name for name in names for word in words)), None)
    product = event.name in PRODUCTS
    if part == "head":
        return "matrix products of the head" if product else "the vocabulary, element by element"
    return part or ("matrix products of the layers" if product else "norms, rotations, activations, casts, ...")


def _own_seconds(event: FunctionEvent) -> float:
    """An operation's time, without that of the operations it calls."""
    return (event.self_device_time_total or event.self_cpu_time_total) / 1e6
