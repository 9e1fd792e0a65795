"""Verdicts on every model's outputs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations
from typing import TYPE_CHECKING, Any

from otpo.files import Row, write_atomically
from pipeline.judge.board import write_panel
from pipeline.judge.judging import Match, judge_task
from pipeline.recipe import identity
from pipeline.run.context import RunContext
from pipeline.run.judges import (
    answering,
    judge_config,
    judge_of,
    own_model_inputs,
    ready_judge,
    reference_inputs,
    reference_of,
    reference_rows,
)
from pipeline.run.stages.generate import read_outputs

if TYPE_CHECKING:
    from eval.tasks import Task


def judge(run: RunContext) -> None:
    """Judge every task that has a judge and something to compare.

    Raises:
        UserError: outputs and reference do not match, or a judge that cannot be asked.
        WorkError: the judge refused in the middle; the replies so far are kept.
    """
    for task in run.sources.tasks.values():
        inputs = judging_inputs(run, task) | {
            "answers": {label: run.manifest.inputs[f"generate/{label}/{task.name}"] for label in run.recipe.labels()}
        }
        config = judge_config(run.recipe, task)
        judged = _judged_labels(run, task) and config.named
        if judged and run.manifest.needs(f"judge/{task.name}", inputs):
            _judge(run, task, inputs)


def judging_inputs(run: RunContext, task: Task) -> dict[str, Any]:
    """What a task's verdicts depend on beside the outputs that are judged."""
    from eval.judge.protocols.registry import protocol_label

    config = judge_config(run.recipe, task)
    protocol = {"protocol": protocol_label(config.protocol)}
    return {
        "judge": identity(run.recipe)["judge"] | protocol | own_model_inputs(run, config),
        "reference": reference_inputs(run, task),
    }


def _judge(run: RunContext, task: Task, inputs: dict[str, Any]) -> None:
    from eval.judge.table import ledger, several_models, write_verdicts

    stage, out = f"judge/{task.name}", run.folder.verdicts(task.name)
    if run.recipe.judge.own_model:  # it gets the engines' memory
        run.engines.close()
        run.engines.join_cluster()
    run.manifest.begin(stage, inputs, [out])
    with (
        run.manifest.doing(stage, inputs, [out]) as figures,
        ready_judge(run, judge_config(run.recipe, task)) as ready,
        answering(run, ready) as config,
    ):
        asked = judge_of(run, config)
        reference = reference_rows(run, task)
        subset = run.recipe.generate.limit is not None
        verdicts = judge_task(asked, _matches(run, task, reference), task.name, subset=subset)
        if asked.rewards is not None:
            asked.rewards.unload()
        write_verdicts(verdicts, out)
        if config.panel:
            write_panel(out.parent, asked.members, verdicts)
        write_atomically(run.folder.reference(task.name), json.dumps(reference, ensure_ascii=False, indent=1))
        figures |= ledger(verdicts)
    if changed := several_models(verdicts):
        run.notes.append(f"{task.name}: {changed}")
    if figures["failed"]:
        run.manifest.reopen(stage)
        counts = ", ".join(f"{count} {kind}" for kind, count in figures["errors"].items())
        run.notes.append(
            f"{task.name}: {figures['failed']} of {len(verdicts)} verdicts failed ({counts}). The board counts them,"
            " and the same command asks for them again."
        )


def _judged_labels(run: RunContext, task: Task) -> list[str]:
    return [label for label in run.recipe.labels() if label != reference_of(run, task).label]


def _matches(run: RunContext, task: Task, reference: list[Row]) -> Iterator[Match]:
    """Every model against the reference; then the trained ones against each other, if that is asked for."""
    labels, name = _judged_labels(run, task), reference_of(run, task).label or "the reference"
    for label in labels:
        yield Match(label, name, read_outputs(run, label, task.name), reference)
    if run.recipe.judge.each_other:
        trained = [label for label in labels if label in run.recipe.methods]
        for first, second in combinations(trained, 2):
            ours, theirs = (read_outputs(run, label, task.name) for label in (second, first))
            yield Match(second, first, ours, theirs)
