"""What a world with known truth allows to measure."""

from __future__ import annotations

from pipeline.run.context import RunContext


def measure(run: RunContext) -> None:
    """Measure the run against its world, if it has one."""
    if run.world is None or run.recipe.world is None:
        return
    manifest, out = run.manifest, run.folder.known_truth
    inputs = {stage: value for stage, value in manifest.inputs.items() if stage.startswith(("generate/", "train/"))}
    if manifest.needs("truth", inputs):
        manifest.begin("truth", inputs, [out])
        with manifest.doing("truth", inputs, [out]):
            run.progress("known truth", 0, 1, "")
            methods = {label: run.recipe.method(label) for label in run.recipe.labels()[1:]}
            run.world.measure(run.folder, run.recipe.labels(), methods)
            run.progress("known truth", 1, 1, "")
