"""How many steps a job takes, how many rows are in each, and at which learning rate."""

from __future__ import annotations

import math


def learning_rate(step: int, total: int, base: float, *, scheduler: str, warmup_ratio: float) -> float:
    """Learning rate of step `step` (from 0) of `total`, as transformers' schedulers of the same names."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return base * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return (
        base * {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[scheduler]
    )


def total_steps(rows: int, *, global_batch_size: int, max_steps: int | None, epochs: float) -> int:
    """Steps of a job over `rows` rows: `max_steps` if given, else enough for `epochs`."""
    if max_steps is not None:
        return max_steps
    return max(1, math.ceil(round(epochs * rows) / global_batch_size))


def rows_in_step(step: int, rows: int, *, global_batch_size: int, max_steps: int | None, epochs: float) -> int:
    """Rows of step `step` (from 0). The last step of an `epochs` run takes what is left: all rows are seen equally."""
    if max_steps is not None:
        return global_batch_size
    return min(global_batch_size, round(epochs * rows) - step * global_batch_size)
