"""The checks before a job's first step (`otpo.training.start_check`), and what they leave in the job's folder."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from otpo.data.token_file import Item
from otpo.errors import UserError
from otpo.files import write_atomically
from otpo.models.policy import PolicyModel
from otpo.training.forward_check import ForwardCheck, check_forward, check_repeats
from otpo.training.objectives import Objective, TrainedModel
from otpo.training.start_check import SHORTEST, StartCheck, check_cached, check_loss, choose_rows
from otpo.training.step import CoupledLosses, LossFunction
from pipeline.run.folder import LabelFolder
from pipeline.train.frozen_models import JobFrozenModels
from pipeline.train.job import TrainJob

SHOWN = 4  # names of weights in a note


class JobStart:
    """Checks one job on this rank; every rank checks the same rows.

    Args:
        items: all that will be trained on.
        dtype: that the model computes in. budget: tokens of a micro-batch.
    """

    def __init__(
        self,
        job: TrainJob,
        model: TrainedModel,
        objective: Objective,
        items: Sequence[Item],
        device: torch.device,
        *,
        dtype: torch.dtype,
        budget: int,
    ):
        self.job, self.model, self.objective, self.dtype = job, model, objective, dtype
        self.choose = partial(choose_rows, device=device.type, budget=budget)
        self.device, rows = device, self.choose(items)
        self.batch = objective.collate(rows).to(device)
        self.short = rows[:SHORTEST]  # enough for what does not depend on length
        self.seconds = 0.0
        self.forward: ForwardCheck | None = None

    def check_forward(self) -> None:
        """Compare the model with its own forward, and let it compute in a way that agrees; see `check_forward`.

        Raises:
            UserError: no way agrees.
        """
        started = time.perf_counter()
        self.forward = check_forward(self.model, self.batch, self.dtype, name=self.job.model)
        self.seconds += time.perf_counter() - started

    def check_frozen(self, model: PolicyModel) -> None:
        """`check_forward` of a model beside the policy."""
        check_forward(model, self.batch, self.dtype)

    def check_losses(self, losses: LossFunction | CoupledLosses, frozen: JobFrozenModels, *, writes: bool) -> None:
        """Check what depends on the frozen models, before any weight has moved.

        Args:
            writes: whether this rank leaves the outcome in the job's folder.

        Raises:
            UserError: the model draws random numbers, or the reference is not the model.
        """
        assert self.forward is not None
        started = time.perf_counter()
        label, model, dtype = self.job.label, self.model, self.dtype
        try:
            repeated = check_repeats(model, self.batch, dtype, self.forward.values, name=self.job.model)
            cached = loss = expected = None
            if "reference" in frozen.caches and isinstance(model, PolicyModel):
                cache = frozen.caches["reference"]
                prompts = self.choose(frozen.prompts)[:SHORTEST]
                cached = check_cached(model, cache, prompts, dtype, where=str(cache.folder))
                batch = self.objective.collate(self.short).to(self.device)
                loss, expected = check_loss(model, self.objective, self.short, batch, losses, frozen.caches, dtype)
        except UserError as error:
            raise UserError(f"{label}: {error}") from error
        self.seconds += time.perf_counter() - started
        found = StartCheck(
            forward=self.forward,
            what="log-probabilities" if isinstance(model, PolicyModel) else "scores",
            completions=len(self.batch.sequences),
            repeated=repeated,
            cached=cached,
            loss=loss,
            expected=expected,
            seconds=self.seconds,
        )
        if writes:
            reading = {
                "not_read": list(getattr(model.lm, "weights_not_read", ())),
                "sent": getattr(model.lm, "weights_sent", ""),
            }
            write_atomically(self.job.folder.start_check, json.dumps(found.to_dict() | reading, indent=1))


def start_line(folder: LabelFolder) -> str:
    """What a training's checks found, in one line; empty before they are done."""
    return str(_read(folder).get("line", ""))


def start_notes(folders: Sequence[LabelFolder]) -> list[str]:
    """A sentence for each label whose log-probabilities could not be computed in the fastest way, or whose start was
    read whole by one worker, or has weights in its files that no part of the model takes.
    """
    notes = []
    for folder in folders:
        found, label = _read(folder), folder.path.name
        if fallback := found.get("fallback"):
            notes.append(f"{label}: {fallback}.")
        if sent := found.get("sent"):
            notes.append(
                f"{label}: the first worker held the start's weights whole, in its memory and on no GPU, and sent each"
                f" worker its part: {sent}."
            )
        if names := found.get("not_read"):
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            notes.append(
                f"{label}: weights in the start's files are not part of the model that is trained and exported:"
                f" {', '.join(names[:SHOWN])}{more}."
            )
    return notes


def _read(folder: LabelFolder) -> dict[str, Any]:
    path = folder.start_check
    return json.loads(path.read_text()) if path.exists() else {}
