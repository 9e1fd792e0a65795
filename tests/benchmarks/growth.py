"""How our DPO step grows with completions, prompts, vocabulary and batch, and what flat batches save.

    make bench-growth

Every variant differs from a base shape in one thing and is timed in turns with it. `padded` computes every prompt twice
and pads all sequences to the longest, as for architectures that cannot share prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace

from tests.benchmarks.shapes import Shape
from tests.benchmarks.turns import counted, ratios


def _times(span: tuple[int, int], factor: float) -> tuple[int, int]:
    return round(span[0] * factor), round(span[1] * factor)


BASE = Shape(384, 6, 6, 2, 32000, 1024, (96, 160), (96, 160))


def main(arguments: list[str]) -> None:
    """Print each variant's ratio to the base shape, then all figures as one JSON line."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks growth", description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args(arguments)

    from tests.benchmarks.ours import Ours, interleaved, one_worker, steps_of

    variants = {"base": (BASE, False), "padded": (BASE, True)}
    for factor in (2, 4):
        longer = replace(BASE, prompt=_times(BASE.prompt, factor))
        variants |= {
            f"completions x{factor}": (replace(BASE, completion=_times(BASE.completion, factor)), False),
            f"prompts x{factor}": (longer, False),
            f"vocabulary x{factor}": (replace(BASE, vocab=BASE.vocab * factor), False),
            f"pairs x{factor}": (replace(BASE, step_pairs=BASE.step_pairs * factor), False),
            f"padded, prompts x{factor}": (longer, True),
        }
    found = {}
    with one_worker() as mesh:
        base = Ours(BASE, mesh, steps_of(BASE, options.steps))
        for name, (shape, padded) in variants.items():
            other = Ours(shape, mesh, steps_of(shape, options.steps), padded=padded)
            seconds = interleaved({"base": base.step, "other": other.step}, options.steps)
            numbers = counted(options.steps)
            over = ratios(seconds["other"], seconds["base"], numbers)
            step = statistics.median(seconds["other"][number] for number in numbers)
            found[name] = {"step_seconds": step, "over_base": over}
            print(f"{name:>22}  {over['median']:5.2f} x base ({over['low']:.2f} to {over['high']:.2f})", flush=True)
    print(json.dumps({"benchmark": "growth", "steps": options.steps, "variants": found}))
