"""The plan of a run's training in one line, before it starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.recipe import ModelConfig, TrainConfig
from pipeline.run.context import RunContext

if TYPE_CHECKING:
    from pipeline.train.tokens import Tokens

log = logging.getLogger(__name__)

UNKNOWN = (
    "none, for GPUs of this kind: where their memory does not suffice, set train.activation_checkpointing=true and a"
    " smaller train.micro_batch_tokens"
)


def say_plan(run: RunContext, labels: Sequence[str], model: ModelConfig, tokens: Tokens, group: TrainConfig) -> None:
    """Tell what training of some labels takes, where the model and the machine tell it.

    Args:
        labels: of `methods`, or "base" alone. model: that they start from.
        group: whose workers train them.
    """
    from otpo.data.token_file import load_tokens
    from pipeline.cluster.hardware import cluster_machine
    from pipeline.cluster.placement import training_room
    from pipeline.plan import measured, plan, shape_of

    try:
        on_gpu = training_room().check(group.fewest_workers, use_gpu=group.use_gpu)
        machine = cluster_machine(group.fewest_workers, gpu=on_gpu)
        if machine is None:
            if on_gpu:
                run.progress("plan", 0, 0, UNKNOWN)
            return
        lora = model.lora.model_dump() if model.lora else None
        shape = shape_of(model.path, lora, model.attn_implementation)
        lengths = measured(load_tokens(tokens.train), "the run")
        made = plan(run.recipe, shape, machine, lengths, labels=labels)
    except Exception as error:  # a plan is advice: a model that it cannot read must not keep a run from training
        log.debug("no plan: %s", error)
        return
    run.progress("plan", 0, 0, made.line)
