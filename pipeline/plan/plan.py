"""What a recipe takes on a machine: memory by part, time, money, and what to change where it does not fit.

    made = plan(recipe, shape_of("meta-llama/Meta-Llama-3-8B-Instruct"), gpu_machine("H100", nodes=1, per_node=8))
    print(made.line)

Everything here is arithmetic on a recipe, a model's config.json and data sheets; `Plan.assumptions` names the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from otpo.training.optimizer import STATE_BYTES
from pipeline.plan.estimate import Case, Estimate
from pipeline.plan.lengths import Lengths, assumed
from pipeline.plan.machine import GIB, Machine
from pipeline.plan.memory import MASTER
from pipeline.plan.shape import Shape
from pipeline.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """What training of a recipe takes.

    Attributes:
        label: the one whose memory is planned: that with the most. labels: how many there are.
        asked: with the recipe's own settings. chosen: with the fastest ones that fit; None where none do.
        asked_fits: whether the recipe's own settings fit; True where the memory is unknown.
        trained: weights that are trained: the model's, or its adapters'.
        steps: of all labels together. step_seconds: their mean, each label with what fits; None on CPUs.
        hours: of training, frozen models and checkpoints, each label as the recipe has it where that fits, else with
            the fastest settings that fit; None on CPUs.
        chosen_hours: the same with `chosen`; None also where nothing fits.
        checkpoint_bytes: of one checkpoint. checkpoint_seconds: to write one. export_bytes: of one trained model.
        advice: what to change, first what costs least; empty where the recipe fits as it is.
        assumptions: what the figures rest on.
    """

    shape: Shape
    machine: Machine
    lengths: Lengths
    label: str
    labels: int
    asked: Estimate
    chosen: Estimate | None
    asked_fits: bool
    trained: int
    steps: int
    step_seconds: float | None
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
    cases = {label: _case(recipe, label, shape, machine, lengths) for label in labels}
    asked = {label: case.asked() for label, case in cases.items()}
    chosen = {label: case.choose() for label, case in cases.items()}
    label = max(labels, key=lambda label: asked[label].total)
    case, trained = cases[label], _trained(recipe, cases[label])
    checkpoint = int((MASTER + STATE_BYTES[case.train.optimizer]) * trained)
    seconds = checkpoint / (machine.disk * machine.nodes)
    best = {each: asked[each] if cases[each].fits(asked[each]) else chosen[each] or asked[each] for each in labels}
    return Plan(
        shape=case.shape,
        machine=machine,
        lengths=case.lengths,
        label=label,
        labels=len(labels),
        asked=asked[label],
        chosen=chosen[label],
        asked_fits=case.fits(asked[label]),
        trained=trained,
        steps=sum(case.steps() for case in cases.values()),
        step_seconds=_mean_step(cases, best),
        hours=_hours(cases, best, seconds),
        chosen_hours=_hours(cases, chosen, seconds),
        checkpoint_bytes=checkpoint,
        checkpoint_seconds=seconds,
        export_bytes=shape.saved_bytes * case.shape.parameters,
        advice=() if case.fits(asked[label]) else tuple(case.advice(chosen[label])),
        assumptions=_assumptions(case, base=recipe.base is not None and "base" not in labels),
    )


def _case(recipe: Recipe, label: str, shape: Shape, machine: Machine, lengths: Lengths) -> Case:
    """A label of a recipe, with the rows that its method makes of the data."""
    spec = None if label == "base" else recipe.method(label)
    objective = spec.method.objective if spec else "supervised"
    if objective == "reward":
        shape = replace(shape, head=0)  # one score in place of the vocabulary
    if objective in ("unpaired", "supervised"):
        lengths = lengths.single(both=objective == "unpaired")
    return Case(recipe.model, recipe.train_of(label), spec, shape, machine, lengths)


def _trained(recipe: Recipe, case: Case) -> int:
    return case.shape.adapters if recipe.model.lora else case.shape.parameters


def duration(hours: float) -> str:
    """Hours; minutes, or seconds, where they are few."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:,.0f} min" if hours >= 1 / 60 else f"{math.ceil(3600 * hours):,} s"


def _mean_step(cases: Mapping[str, Case], estimates: Mapping[str, Estimate]) -> float | None:
    """Seconds of a step, as a mean over all labels' steps; None on CPUs."""
    seconds = [(case.steps(), estimates[label].step_seconds) for label, case in cases.items()]
    total = sum(steps * (each or 0.0) for steps, each in seconds)
    return total / sum(steps for steps, _ in seconds) if all(each for _, each in seconds) else None


def _hours(cases: Mapping[str, Case], estimates: Mapping[str, Estimate | None], checkpoint: float) -> float | None:
    """Hours of all labels' steps and checkpoints, and of the frozen models that they share; None for unknown steps.

    Args:
        estimates: of each label. checkpoint: seconds of one.
    """
    seconds, frozen = 0.0, dict[tuple[str, str, str], float]()
    for label, case in cases.items():
        found = estimates[label]
        if found is None or found.step_seconds is None:
            return None
        seconds += case.seconds(found.step_seconds, checkpoint)
        frozen |= case.frozen_seconds()
    return (seconds + sum(frozen.values())) / 3600


def _assumptions(case: Case, *, base: bool) -> tuple[str, ...]:
    """`base`: whether a base is trained before that the plan leaves out."""
    machine, said = case.machine, [f"rows: {case.lengths.source}"]
    said += ["base: its training is not counted"] if base else []
    if (gpu := machine.gpu) is not None:
        between = f" and {machine.network / 1e9:,.0f} GB/s a GPU between nodes" if machine.nodes > 1 else ""
        said += [
            f"speed: {machine.utilisation:.0%} of the {gpu.peak(case.dtype_bytes) / 1e12:,.0f} TFLOP/s of"
            f" {gpu.name}'s data sheet in {case.train.dtype} while"
            " a step computes, repeated operations included; alone, an H100 reached 41 % with a 1B model and an H200 49"
            " to 54 % with 3B and 8B; torchtitan reports an MFU of 33 to 39 % for pre-training an 8B model on several",
            f"links: half of {gpu.links / 1e9:,.0f} GB/s a GPU within a node{between}, while the step computes",
        ]
    return (*said, f"storage: {machine.disk / 1e9:g} GB/s from each node")
