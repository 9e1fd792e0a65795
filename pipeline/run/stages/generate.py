"""Outputs of every model for every task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otpo.files import Row
from otpo.identity import source_identity
from pipeline.run.context import RunContext
from pipeline.run.inputs import engine_inputs, sampling_inputs

if TYPE_CHECKING:
    from eval.tasks import Task
    from pipeline.generate.outputs import GenerationResult


def generate(run: RunContext) -> None:
    """Generate what is missing.

    Raises:
        UserError: a model or prompts that cannot be used. WorkError: an engine failed; the outputs so far are kept.
    """
    manifest = run.manifest
    for label in run.recipe.labels():
        model = manifest.inputs["base" if label == "base" else f"train/{label}"]
        for name, task in run.sources.tasks.items():
            stage = f"generate/{label}/{name}"
            inputs = {"model": model, **generation_inputs(run, task)}
            if manifest.needs(stage, inputs):
                folder = run.folder.label(label)
                manifest.begin(stage, inputs, [folder.outputs(name)])
                with manifest.doing(stage, inputs, [folder.outputs(name)]) as figures:
                    result = generate_task(run, run.sources.model(label), label, task, folder.generation(name))
                    figures |= {key: result.report[key] for key in ("n", "truncated", "errors", "tokens")}


def generation_inputs(run: RunContext, task: Task) -> dict[str, Any]:
    """What outputs depend on beside the model."""
    return {
        "sampling": sampling_inputs(run.recipe),
        "engine": engine_inputs(run.recipe, run.sources.generation_template),
        "task": [task.name, source_identity(task.source), len(task.prompts)],
    }


def generate_task(run: RunContext, model: str | Path, label: str, task: Task, out: Path) -> GenerationResult:
    """One model's outputs for one task, written to the folder `out`; what is there already is not generated again."""
    from pipeline.generate.engine import Sampling

    return run.engines.pool().generate(
        model,
        label,
        task.prompts,
        Sampling(**sampling_inputs(run.recipe)),
        out,
        run.sources.generation_template,
        run.progress,
        f"generate {label} {task.name}",
    )


def read_outputs(run: RunContext, label: str, task: str) -> list[Row]:
    """What a model of the run generated for a task."""
    return json.loads(run.folder.outputs(label, task).read_text())
