"""How our DPO step grows with answers, prompts, vocabulary and batch, and what laying pairs out flat saves.

    make bench-growth

Every variant is timed in turns with the shape it differs from by one thing. `padded` computes every prompt twice and
pads all sequences to the longest, as for architectures that cannot share prompts.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from tests.benchmarks.shapes import PAIRS, Shape


def _times(span: tuple[int, int], factor: float) -> tuple[int, int]:
    return round(span[0] * factor), round(span[1] * factor)


BASE = Shape(384, 6, 6, 2, 32000, 1024, (96, 160), (96, 160))


def main(arguments: list[str]) -> None:
    """Print each variant's ratio to the base shape, then all figures as one JSON line."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks growth", description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args(arguments)

    from tests.benchmarks.ours import Ours, interleaved, one_worker, quartiles, steps_of

    variants: dict[str, tuple[Shape, int, bool]] = {"base": (BASE, PAIRS, False)}
    for factor in (2, 4):
        variants |= {
            f"answers x{factor}": (replace(BASE, answer=_times(BASE.answer, factor)), PAIRS, False),
            f"prompts x{factor}": (replace(BASE, prompt=_times(BASE.prompt, factor)), PAIRS, False),
            f"vocabulary x{factor}": (replace(BASE, vocab=BASE.vocab * factor), PAIRS, False),
            f"pairs x{factor}": (BASE, PAIRS * factor, False),
            f"padded, prompts x{factor}": (replace(BASE, prompt=_times(BASE.prompt, factor)), PAIRS, True),
        }
    variants["padded"] = (BASE, PAIRS, True)
    found = {}
    with one_worker() as mesh:
        base = Ours(BASE, mesh, steps_of(BASE, options.steps + 3))
        for name, (shape, pairs, padded) in variants.items():
            other = Ours(shape, mesh, steps_of(shape, options.steps + 3, pairs=pairs), padded=padded)
            seconds = interleaved({"base": base.step, "other": other.step}, options.steps)
            low, middle, high = quartiles([a / b for a, b in zip(seconds["other"], seconds["base"], strict=True)])
            found[name] = {
                "over_base": middle,
                "quartiles": [low, high],
                "step_seconds": quartiles(seconds["other"])[1],
            }
            print(f"{name:>22}  {middle:5.2f} x base ({low:.2f} to {high:.2f})", flush=True)
    print(json.dumps({"benchmark": "growth", "steps": options.steps, "variants": found}))
