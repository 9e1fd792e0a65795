"""Training of the recipe's methods, in one worker group."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from otpo.identity import source_identity
from pipeline.milestones.selection import judging_milestones, selection_inputs
from pipeline.recipe import ModelConfig
from pipeline.run.context import RunContext
from pipeline.run.inputs import reading_inputs, training_inputs
from pipeline.run.metrics import nearly_uniform, seconds_of_steps
from pipeline.run.planned import say_plan


def train(run: RunContext, labels: Sequence[str] | None = None) -> None:
    """Train the labels that are not trained yet.

    Args:
        labels: those of the recipe that are wanted; by default all. A label's frozen models must be among them.

    Raises:
        UserError: wrong settings, or too small a cluster. WorkError: training failed; checkpoints are kept.
    """
    todo = untrained(run, labels)
    if not todo:
        return
    manifest, folder = run.manifest, run.folder
    for label in todo:
        manifest.begin(f"train/{label}", manifest.inputs[f"train/{label}"], [folder.label(label).path])
    if run.engines.on_gpu:
        run.engines.close()  # training wants the GPUs
    started = time.perf_counter()
    tokens = fit_labels(run, todo, run.sources.start)
    seconds = time.perf_counter() - started
    steps = {label: seconds_of_steps(folder.label(label).metrics) for label in todo}
    run.notes.extend(nearly_uniform({label: folder.label(label).metrics for label in todo}))
    for label in todo:
        with manifest.doing(f"train/{label}", manifest.inputs[f"train/{label}"], [folder.model(label)]) as figures:
            share = seconds * steps[label] / max(sum(steps.values()), 1e-9)
            figures |= {"tokens": tokens[label], "trained_together": todo, "seconds": round(share, 2)}


def untrained(run: RunContext, labels: Sequence[str] | None = None) -> list[str]:
    """Note what each label is trained from; those that have to be trained, in the order of training."""
    wanted = run.recipe.methods if labels is None else labels
    return [
        label
        for label in run.recipe.training_order()
        if label in wanted and run.manifest.needs(f"train/{label}", method_inputs(run, label))
    ]


def method_inputs(run: RunContext, label: str) -> dict[str, Any]:
    """What a label is made from. Its frozen models must have been noted before it."""
    recipe, inputs = run.recipe, run.manifest.inputs
    spec = recipe.method(label)
    found: dict[str, Any] = {
        "base": inputs["base"],
        "rows": pairs_inputs(run),
        "train": training_inputs(recipe, label),
        "data": reading_inputs(recipe),
        "method": [spec.method.name, spec.hyperparameters],
    }
    if spec.frozen_models:
        found["scorers"] = {
            name: inputs.get(f"train/{source}") or source_identity(run.sources.resolve(source))
            for name, source in spec.frozen_models.items()
        }
    return found | selection_inputs(run, label)


def pairs_inputs(run: RunContext) -> Any:
    """Which preference pairs are trained on."""
    if run.recipe.pairs:
        return run.manifest.inputs["pairs"]
    source = run.sources.pairs
    if isinstance(source, str):
        return source_identity(source)
    return {name: source_identity(path) for name, path in source.items()}


def fit_labels(run: RunContext, labels: list[str], model: ModelConfig) -> dict[str, str]:
    """Train labels from `model` in one worker group; gives the file of token ids that each was trained on."""
    supervised = labels == ["base"]
    tokens = run.sources.tokens(supervised=supervised)
    from pipeline.cluster.connect import connect
    from pipeline.cluster.placement import training_room
    from pipeline.events.watch import watching
    from pipeline.train.job_start import start_notes
    from pipeline.train.launcher import fit, make_job, padded_batches

    connect(run.recipe.cluster.address)
    folder, caches = run.folder.path, run.folder.frozen_caches
    resolve = run.sources.resolve
    jobs = [
        make_job(run.recipe, folder, label, model=model, tokens=tokens, caches=caches, resolve=resolve)
        for label in labels
    ]
    if not supervised:
        run.notes.extend(padded_batches(model))
    group = run.recipe.train_of("base") if supervised else run.recipe.train
    say_plan(run, labels, model, tokens, group)
    on_gpu = training_room().check(group.fewest_workers, use_gpu=group.use_gpu)
    with (
        judging_milestones(run, labels, group.fewest_workers),
        watching(run.folder, run.progress, workers=group.fewest_workers, gpu=on_gpu),
    ):
        fit(
            jobs,
            folder,
            name="base" if supervised else "methods",
            train=group,
            cluster=run.recipe.cluster,
            progress=run.progress,
        )
    run.notes.extend(start_notes([job.folder for job in jobs]))
    return {job.label: job.tokens for job in jobs}
