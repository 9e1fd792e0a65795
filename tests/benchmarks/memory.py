"""Peak memory of one worker's steps against the plan's, by shape: on a GPU torch's own figure, on a CPU the process's.

python -m tests.benchmarks memory 30m-short --steps 4
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from otpo.training.optimizer import STATE_BYTES
from pipeline.plan.memory import Load, memory_parts
from pipeline.plan.shape import shape_of
from tests.benchmarks.shapes import LORA, PAIRS, SHAPES

MIB = 2**20
CPU_SHAPES = ("30m-short", "30m-long", "135m-long")


def main(arguments: list[str]) -> None:
    """Print the planned and the measured peak of each shape, and the error of the plan."""
    parser = argparse.ArgumentParser(prog="memory", description=__doc__)
    parser.add_argument("shapes", nargs="*", default=CPU_SHAPES)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--alone", action="store_true", help="measure one shape in this process")
    options = parser.parse_args(arguments)
    if options.alone:
        print(json.dumps(measure(options.shapes[0], options.steps)))
        return
    found = {}
    for name in options.shapes:  # each in a process of its own: a peak never falls
        command = [sys.executable, "-m", "tests.benchmarks", "memory", name, "--steps", str(options.steps), "--alone"]
        line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        found[name] = figures = json.loads(line)
        print(
            f"{name:14} planned {figures['planned']:8,.0f} MiB, measured {figures['measured']:8,.0f} MiB,"
            f" error {figures['error']:+.0%}",
            flush=True,
        )
    print(json.dumps({"benchmark": "memory", "shapes": found}))


def measure(name: str, steps: int) -> dict[str, float]:
    """MiB that a shape's steps take above the process before the model, planned and measured."""
    import torch

    from tests.benchmarks.ours import Ours, one_worker, steps_of

    shape, cuda = SHAPES[name], torch.cuda.is_available()
    work = steps_of(shape, steps)
    with one_worker() as mesh:
        torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))  # libraries load now
        before = 0 if cuda else _peak()
        ours = Ours(shape, mesh, work)
        for step in range(steps):
            ours.step(step)
        after = torch.cuda.max_memory_allocated() if cuda else _peak()
    batches = [batch for members in work for batch in members]
    largest = max(batches, key=lambda batch: sum(batch.segments))
    with tempfile.TemporaryDirectory() as folder:
        config = shape.config()
        config.dtype = torch.bfloat16 if shape.lora else torch.float32
        config.save_pretrained(Path(folder))
        planned_shape = shape_of(folder, LORA if shape.lora else None)
    load = Load(
        dtype_bytes=2,
        adapters=shape.lora,
        four_bit=False,
        live_reference=False,
        states=False,
        tokens=sum(largest.segments),
        sequence_tokens=sum(largest.lengths),
        completion_tokens=int(largest.mask.sum()),
        micro_batches=max(len(members) for members in work),
        checkpointing=shape.checkpointing,
        compiled=cuda,
        state_bytes=STATE_BYTES[shape.optimizer],
    )
    parts = memory_parts(planned_shape, load, 1, "cuda" if cuda else "cpu")
    planned = sum(parts.values()) - parts["CUDA and NCCL" if cuda else "libraries"]
    if cuda:
        planned -= parts["unused blocks"]
    measured = after - before
    return {"planned": planned / MIB, "measured": measured / MIB, "error": planned / measured - 1, "pairs": PAIRS}


def _peak() -> int:
    """Bytes of memory that this process has held at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
