"""Supervised training of the base, if the recipe has one."""

from __future__ import annotations

from otpo.identity import source_identity
from pipeline.run.context import RunContext
from pipeline.run.inputs import reading_inputs, training_inputs
from pipeline.run.stages.train import fit_labels


def base(run: RunContext) -> None:
    """Train the base; without one, note which model everything starts from."""
    recipe, sources, manifest = run.recipe, run.sources, run.manifest
    if recipe.base is None:
        manifest.inputs["base"] = {"model": source_identity(sources.start.path)}
        return
    model = sources.resolve(recipe.model.path)
    inputs = {
        "model": source_identity(model),
        "rows": source_identity(sources.base_rows),
        "train": training_inputs(recipe, "base"),
        "data": reading_inputs(recipe),
    }
    if manifest.needs("base", inputs):
        folder = run.folder.label("base")
        manifest.begin("base", inputs, [folder.path])
        with manifest.doing("base", inputs, [folder.model]):
            fit_labels(run, ["base"], recipe.model.model_copy(update={"path": model}))
