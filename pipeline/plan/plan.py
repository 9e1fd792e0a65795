"""What a recipe takes on a machine: memory by part, time, money, and what to change where it does not fit.

    made = plan(recipe, shape_of("meta-llama/Meta-Llama-3-8B-Instruct"), gpu_machine("H100", nodes=1, per_node=8))
    print(made.line)

Everything here is arithmetic on a recipe, a model's config.json and data sheets; `Plan.assumptions` names the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from otpo.training.optimizer import STATE_BYTES
from pipeline.plan.estimate import Case, Estimate
from pipeline.plan.lengths import Lengths, assumed
from pipeline.plan.machine import GIB, Machine
from pipeline.plan.memory import MASTER
from pipeline.plan.shape import Shape
from pipeline.plan.speed import reference_seconds
from pipeline.recipe import Recipe
from pipeline.recipe.sections import SAVING_SHARE


@dataclass(frozen=True)
class Plan:
    """What training of a recipe takes.

    Attributes:
        label: the one whose memory is planned: that with the most.
        asked: with the recipe's own settings. chosen: with the fastest ones that fit; None where none do.
        asked_fits: whether the recipe's own settings fit; True where the memory is unknown.
        trained: weights that are trained: the model's, or its adapters'.
        steps: of all labels together.
        hours: of training, reference and checkpoints, with `asked` where that fits, else with `chosen`; None on CPUs.
        chosen_hours: the same with `chosen`; None also where nothing fits.
        checkpoint_bytes: of one checkpoint. checkpoint_seconds: to write one. export_bytes: of one trained model.
        advice: what to change, first what costs least; empty where the recipe fits as it is.
        assumptions: what the figures rest on.
    """

    shape: Shape
    machine: Machine
    lengths: Lengths
    label: str
    asked: Estimate
    chosen: Estimate | None
    asked_fits: bool
    trained: int
    steps: int
    hours: float | None
    chosen_hours: float | None
    checkpoint_bytes: int
    checkpoint_seconds: float
    export_bytes: int
    advice: tuple[str, ...]
    assumptions: tuple[str, ...]

    @property
    def usd(self) -> float | None:
        """What the hours cost, where a price was given."""
        price = self.machine.usd_per_gpu_hour
        return None if price is None or self.hours is None else price * self.hours * self.machine.ranks

    @property
    def line(self) -> str:
        """The plan in a line, for the start of a run."""
        machine, total = self.machine, self.asked.total
        if machine.gpu is None:
            total *= machine.per_node
        room = f" of {machine.memory / GIB:,.0f}" if machine.memory else ""
        where = "a GPU" if machine.gpu else f"in {machine.per_node} worker{'s' * (machine.per_node > 1)}"
        digits = 0 if total >= 10 * GIB else 1
        hours = f", {duration(self.hours)} of training" if self.hours is not None and self.asked_fits else ""
        needs = "" if self.asked_fits else f"; it may not fit: {'; or '.join(self.advice) or 'take a smaller model'}"
        return f"{total / GIB:,.{digits}f}{room} GiB {where} at the peak{hours}{needs}"


def plan(
    recipe: Recipe,
    shape: Shape,
    machine: Machine,
    lengths: Lengths | None = None,
    labels: Sequence[str] | None = None,
) -> Plan:
    """Plan the training of a recipe's methods.

    Args:
        shape: of the model, with the recipe's adapters (`shape_of`).
        lengths: of the rows; by default assumed.
        labels: which of `methods`, or "base" alone; by default all methods, or the base where there are none.
    """
    lengths = lengths or assumed(recipe)
    labels = list(labels or recipe.methods) or ["base"]
    cases = {
        label: Case(
            recipe.model,
            recipe.train_of(label),
            None if label == "base" else recipe.method(label),
            shape,
            machine,
            lengths,
        )
        for label in labels
    }
    label = max(labels, key=lambda label: cases[label].asked().total)
    case = cases[label]
    asked, chosen = case.asked(), case.choose()
    fits = case.fits(asked)
    trained = shape.adapters if recipe.model.lora else shape.parameters
    checkpoint = int((MASTER + STATE_BYTES[case.train.optimizer]) * trained)
    seconds = checkpoint / (machine.disk * machine.nodes)
    best = asked if fits or chosen is None else chosen
    hours, chosen_hours = (
        None if each is None else _hours(cases, each.step_seconds, seconds) for each in (best, chosen)
    )
    return Plan(
        shape=shape,
        machine=machine,
        lengths=lengths,
        label=label,
        asked=asked,
        chosen=chosen,
        asked_fits=fits,
        trained=trained,
        steps=sum(case.steps() for case in cases.values()),
        hours=hours,
        chosen_hours=chosen_hours,
        checkpoint_bytes=checkpoint,
        checkpoint_seconds=seconds,
        export_bytes=shape.saved_bytes * shape.parameters,
        advice=() if fits else tuple(case.advice(chosen)),
        assumptions=_assumptions(case, base=recipe.base is not None and "base" not in labels),
    )


def duration(hours: float) -> str:
    """Hours; minutes, or seconds, where they are few."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:,.0f} min" if hours >= 1 / 60 else f"{math.ceil(3600 * hours):,} s"


def _hours(cases: dict[str, Case], step: float | None, checkpoint: float) -> float | None:
    """Hours of all labels' steps and checkpoints, and of the reference, which they share; None for unknown steps."""
    if step is None:
        return None
    seconds = 0.0
    for case in cases.values():
        seconds += case.steps() * step + _checkpoints(case, step, checkpoint) * checkpoint
    first = next(iter(cases.values()))
    if any(case.spec and "reference" in case.spec.method.needs for case in cases.values()):
        seconds += reference_seconds(first.shape, first.lengths, first.machine, first.dtype_bytes)
    return seconds / 3600


def _checkpoints(case: Case, step: float, checkpoint: float) -> int:
    """Checkpoints that a label saves; `step` and `checkpoint` in seconds."""
    if case.train.save_every:
        return case.steps() // case.train.save_every
    if case.train.save_minutes is None:
        return 0
    return int(case.steps() * step / max(60 * case.train.save_minutes, SAVING_SHARE * checkpoint))


def _assumptions(case: Case, *, base: bool) -> tuple[str, ...]:
    """`base`: whether a base is trained before that the plan leaves out."""
    machine, said = case.machine, [f"rows: {case.lengths.source}"]
    said += ["base: its training is not counted"] if base else []
    if (gpu := machine.gpu) is not None:
        between = f" and {machine.network / 1e9:,.0f} GB/s a GPU between nodes" if machine.nodes > 1 else ""
        said += [
            f"speed: {machine.utilisation:.0%} of the {gpu.peak(case.dtype_bytes) / 1e12:,.0f} TFLOP/s of"
            f" {gpu.name}'s data sheet in {case.train.dtype} while"
            " a step computes, repeated operations included; one H100 reached 41 % with a 1B model, and torchtitan"
            " reports an MFU of 33 to 39 % for pre-training an 8B model on several",
            f"links: half of {gpu.links / 1e9:,.0f} GB/s a GPU within a node{between}, while the step computes",
        ]
    return (*said, f"storage: {machine.disk / 1e9:g} GB/s from each node")
