"""What a job does to fit a GPU's memory, where the recipe leaves it open."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from otpo.data.token_file import load_tokens
from otpo.methods.spec import resolve
from pipeline.plan.estimate import Case
from pipeline.plan.lengths import measured
from pipeline.plan.machine import Machine
from pipeline.plan.shape import shape_of
from pipeline.recipe import ModelConfig, TrainConfig
from pipeline.train.job import TrainJob

log = logging.getLogger(__name__)


def fitted(job: TrainJob, machine: Machine | None) -> TrainJob:
    """A job whose `activation_checkpointing` and `sharding` are no longer "auto", and whose micro-batches fit.

    Args:
        machine: of GPUs that it is trained on; None on CPUs, or where nobody knows.
    """
    train = job.train
    left = {"activation_checkpointing": False, "sharding": "full"}
    chosen: dict[str, Any] = {key: value for key, value in left.items() if train[key] == "auto"}
    if machine is not None and chosen:
        try:
            settings = _case(job, machine).asked().settings
            if "sharding" in chosen:
                chosen["sharding"] = "hybrid" if settings.hybrid else "full"
            if "activation_checkpointing" in chosen:
                chosen["activation_checkpointing"] = settings.activation_checkpointing
                chosen["micro_batch_tokens"] = settings.micro_batch_tokens
        except Exception as error:  # a plan is advice: a model that it cannot read must not keep a run from training
            log.debug("no plan: %s", error)
    return replace(job, train=train | chosen)


def _case(job: TrainJob, machine: Machine) -> Case:
    return Case(
        ModelConfig(
            path=job.model,
            attn_implementation=job.attn_implementation,
            lora=job.lora,  # type: ignore[arg-type]  # pydantic makes a section of it
            quantization=job.quantization,  # type: ignore[arg-type]  # it was checked in the recipe
        ),
        TrainConfig(**job.train),
        None if job.method is None else resolve(job.label, job.method),
        shape_of(job.model, job.lora, job.attn_implementation),
        machine,
        measured(load_tokens(job.tokens), "the run"),
    )
