"""A plan as text: all of it, or a row of a table."""

from __future__ import annotations

from pipeline.plan.estimate import Estimate
from pipeline.plan.machine import GIB
from pipeline.plan.plan import Plan, duration
from pipeline.plan.serving import Serving

COLUMNS = (
    "on", "fits", "GiB a GPU", "micro-batch", "checkpointing", "sharding", "tokens/s a GPU", "MFU", "training",
    "checkpoint",
)  # fmt: skip


def lines(made: Plan, served: Serving | None) -> list[str]:
    """The plan, as a person reads it."""
    shape, said = made.shape, []
    said.append(
        f"{shape.name}: {_billions(shape.parameters)} parameters"
        + (f", {_billions(shape.adapters)} of adapters are trained" if _adapters(made) else "")
    )
    said.append(f"{made.label} on {made.machine}, the recipe as it is: {made.line}")
    said += _parts(made.asked)
    if made.chosen is not None and made.chosen.settings != made.asked.settings:
        said.append(f"fastest that fits: {_settings(made.chosen)}, {made.chosen.total / GIB:,.1f} GiB")
        said += _parts(made.chosen)
    for number, advice in enumerate(made.advice, start=1):
        said.append(f"to make it fit, {number}: {advice}")
    best = made.asked if made.asked_fits or made.chosen is None else made.chosen
    if made.step_seconds is not None and made.hours is not None:
        waiting = 1 - (best.computing or 0)
        said.append(
            f"time: {made.steps:,} steps of {made.step_seconds:,.1f} s{' on average' * (made.labels > 1)},"
            f" {made.label} with {best.tokens_per_second:,.0f} tokens/s a GPU, MFU {best.mfu:.0%}"
            + (f", of which {waiting:.0%} waits for links" if waiting > 0.01 else "")
        )
        price = f", {made.usd:,.0f} USD" if made.usd is not None else " (--price USD for their cost)"
        said.append(
            f"training, frozen models and checkpoints: {duration(made.hours)}, {_gpu_hours(made):,.1f} GPU hours{price}"
        )
    said.append(
        f"a checkpoint: {made.checkpoint_bytes / 1e9:,.1f} GB, {made.checkpoint_seconds:,.0f} s; a trained model:"
        f" {made.export_bytes / 1e9:,.1f} GB"
    )
    if served is not None:
        said += _serving(served, made.machine.per_node)
    said.append("assumed:")
    said += [f"  {each}" for each in (*made.assumptions, *(served.assumptions if served else ()))]
    return said


def row(made: Plan) -> list[str]:
    """The plan as a row of `COLUMNS`, with the fastest settings that fit."""
    best = made.chosen
    if best is None:
        least = made.advice[0] if made.advice else ""
        return [str(made.machine), f"no; {least}" if least else "no", *["-"] * (len(COLUMNS) - 2)]
    hours = "-" if made.chosen_hours is None else duration(made.chosen_hours)
    return [
        str(made.machine),
        "yes",
        f"{best.total / GIB:,.0f}",
        f"{best.settings.micro_batch_tokens:,} tokens",
        "yes" if best.settings.activation_checkpointing else "no",
        "hybrid" if best.settings.hybrid else "full",
        f"{best.tokens_per_second or 0:,.0f}",
        f"{best.mfu or 0:.0%}",
        hours,
        f"{made.checkpoint_bytes / 1e9:,.1f} GB",
    ]


def _parts(estimate: Estimate) -> list[str]:
    width = max(map(len, estimate.parts))
    return [f"  {name:{width}}  {size / GIB:8,.2f} GiB" for name, size in estimate.parts.items()]


def _settings(estimate: Estimate) -> str:
    settings = estimate.settings
    checkpointing = "with" if settings.activation_checkpointing else "without"
    sharding = ", sharded within each node" if settings.hybrid else ""
    return (
        f"micro-batches of {settings.micro_batch_tokens:,} tokens, {checkpointing} activation checkpointing{sharding}"
    )


def _serving(served: Serving, per_node: int) -> list[str]:
    said = [f"generation: {_engines(served, per_node)}"]
    if served.calls:
        price = f"{served.usd:,.0f} USD" if served.usd else "no price in the recipe"
        said.append(f"judge: {served.calls:,} calls, {price}")
    return said


def _engines(served: Serving, per_node: int) -> str:
    """What engines hold and take, or why there are none."""
    gpus = f"{served.gpus} GPU{'s' * (served.gpus > 1)}"
    if served.gpus not in served.sizes:
        sizes = served.fitting or f"one of {', '.join(map(str, served.sizes))}"
        return f"{gpus} of an engine (generate.tensor_parallel_size) cannot share the model evenly: set {sizes}"
    if not served.engines:
        return f"no node has room for an engine of {gpus} (generate.tensor_parallel_size): each has {per_node}"
    said = f"{served.engines} engine{'s' * (served.engines > 1)} of {gpus}, {served.weights / GIB:,.1f} GiB of weights"
    if served.cache > 0:
        took = f"{served.outputs:,} outputs in {duration(served.hours)}"
        return f"{said} on each GPU, {served.cache / GIB:,.1f} GiB for the cache; {took}"
    change = f"set generate.tensor_parallel_size={served.fitting}" if served.fitting else "it takes larger nodes"
    return f"{said} on each GPU, which do not fit: {change}"


def _adapters(made: Plan) -> bool:
    return made.trained == made.shape.adapters


def _gpu_hours(made: Plan) -> float:
    return (made.hours or 0) * made.machine.ranks


def _billions(count: int) -> str:
    return f"{count / 1e9:,.2f} B" if count >= 1e9 else f"{count / 1e6:,.1f} M"
