"""Whether a job's settings give steps that learn anything from the rows that there are."""

from __future__ import annotations

from otpo.errors import UserError
from otpo.training.schedule import learning_rate, total_steps
from pipeline.recipe import TrainConfig


def check_steps(label: str, rows: int, train: TrainConfig) -> None:
    """Refuse a job that would train on no row, or with a learning rate of 0 in every step.

    Args:
        label: one of `methods`, or "base".
        rows: pairs or completions to train on.

    Raises:
        UserError: says which setting to change.
    """
    where = "base" if label == "base" else f"methods.{label}"
    if train.max_steps is None and round(train.epochs * rows) < 1:
        raise UserError(
            f"{where}: {train.epochs:g} epochs of {rows} rows are not one row: raise train.epochs, or set"
            " train.max_steps."
        )
    size = train.global_batch_size
    steps = total_steps(rows, global_batch_size=size, max_steps=train.max_steps, epochs=train.epochs)
    rates = (
        learning_rate(step, steps, train.learning_rate, scheduler=train.lr_scheduler, warmup_ratio=train.warmup_ratio)
        for step in range(steps)
    )
    if not any(rates):
        batch = f" (train.global_batch_size is {size}, and there are {rows} rows)" if size > rows else ""
        raise UserError(
            f"{where}: the training has {steps} step{'s' if steps > 1 else ''}{batch}, and its learning rate is 0 while"
            " it warms up: nothing would be learned. Lower train.global_batch_size, raise train.epochs or"
            " train.max_steps, or set train.warmup_ratio=0."
        )


def small_data(rows: int, train: TrainConfig) -> str | None:
    """What a person should know about a batch that is larger than the data."""
    if train.global_batch_size <= rows:
        return None
    return (
        f"train.global_batch_size is {train.global_batch_size}, and there are {rows} rows: a step takes all of them,"
        " and some more than once where there is more than one step"
    )
