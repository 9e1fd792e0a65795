"""From a recipe and its token ids to trained models: one Ray Train worker group for all jobs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from otpo.identity import model_fingerprint
from otpo.kernels.cpu.allocator import ALLOCATOR
from otpo.models.adapters import check_quantization
from otpo.models.attention import why_padded
from otpo.models.compiled import check_compiler
from otpo.models.disk.architecture import is_multimodal, language_config, read_config
from otpo.training.optimizer import check_optimizer
from otpo.training.schedule import total_steps
from pipeline.cluster.hardware import cluster_machine
from pipeline.cluster.placement import training_room
from pipeline.events.gauges import set_training
from pipeline.plan.fitted import fitted
from pipeline.progress import Progress
from pipeline.recipe import ModelConfig, Recipe, TrainConfig
from pipeline.recipe.sections import ClusterConfig
from pipeline.run.folder import RunFolder
from pipeline.run.metrics import newest_step
from pipeline.train import model_card
from pipeline.train.faults.controller import GroupEvents
from pipeline.train.faults.policy import FAILURE_FILE, explained, failure_config, ray_train_limits
from pipeline.train.faults.preemption import has_left
from pipeline.train.job import TrainJob
from pipeline.train.job_start import start_line
from pipeline.train.steps import check_steps
from pipeline.train.tokens import Tokens
from pipeline.train.worker import train_worker

SNAPSHOT = "checkpoint_manager_snapshot.json"
RESIZE_SECONDS = 60.0  # between two looks whether the nodes have room for more workers
COLLECTIVE_SECONDS = 1800  # a collective's limit: rank 0 may write a large model all that time while others wait


def padded_batches(model: ModelConfig) -> list[str]:
    """A note about a model that cannot share prompts, which makes training slower; empty for other models."""
    config = read_config(model.path)
    kind = (language_config(config) if is_multimodal(config) else config).model_type
    why = why_padded(kind, model.attn_implementation)
    return [f"Batches were padded and prompts computed once for each completion: {why}."] if why else []


def make_job(
    recipe: Recipe,
    folder: Path,
    label: str,
    *,
    model: ModelConfig,
    tokens: Tokens,
    caches: Path,
    resolve: Callable[[str], str] = str,
) -> TrainJob:
    """One label's job.

    Args:
        folder: of the run.
        label: one of `methods`, or "base" for supervised training.
        model: that training starts from.
        caches: the folder of frozen models' log-probabilities.
        resolve: a source of the recipe as an absolute path or hub name: workers have other working directories.

    Raises:
        UserError: the settings and the rows give no step that learns anything.
    """
    train = recipe.train_of(label)
    spec = None if label == "base" else recipe.method(label)
    rewards = recipe.trains_rewards(label)
    tokens = tokens if spec is None else tokens.of(spec)
    models = {"reference": model.path} if spec and "reference" in spec.method.needs else {}
    check_steps(label, tokens.epoch, train)
    for name, source in (spec.frozen_models if spec else {}).items():
        models[name] = str(RunFolder(folder).model(source)) if source in recipe.methods else resolve(source)
    return TrainJob(
        label=label,
        model=model.path,
        model_fingerprint=model_fingerprint(model.path),
        attn_implementation=model.attn_implementation,
        tokens=tokens.train,
        validation_tokens=tokens.validation,
        out=str(RunFolder(folder).label(label).path),
        events=str(RunFolder(folder).events),
        train=train.model_dump(),
        total_steps=total_steps(
            tokens.epoch,
            global_batch_size=train.global_batch_size,
            max_steps=train.max_steps,
            epochs=train.epochs,
        ),
        method=None if spec is None else spec.settings,
        frozen_models=models,
        caches=str(caches),
        tokens_hash=tokens.hash,
        card=model_card.model_card(recipe, label, start=model.path, train=train, spec=spec, report=tokens.report),
        template=tokens.report.rendering,
        margins=tokens.margins if rewards else None,
        lora=model.lora.model_dump() if model.lora else None,
        quantization=model.quantization,
        score_pad=tokens.score_pad if rewards else None,
        milestones=train.eval_every if train.selects_by_judge else None,
        sets=[
            {"name": each.name, "items": each.items, "taken": each.taken, "rows": [each.first, each.end]}
            for each in tokens.sets
        ],
    )


def fit(
    jobs: list[TrainJob],
    folder: Path,
    *,
    name: str,
    train: TrainConfig,
    cluster: ClusterConfig,
    progress: Progress,
    cpus: int | None = None,
) -> None:
    """Run jobs on one Ray Train worker group, in order. Finished jobs are skipped.

    Args:
        folder: of the run.
        name: of Ray Train's own folder below `folder/ray`.
        train: its `workers`, `min_workers`, `use_gpu` and `max_failures` hold for the group.
        cluster: how long the group waits for nodes and workers.
        cpus: of each worker; by default the cluster is divided evenly.

    Raises:
        UserError: the cluster is too small, or a worker found wrong input.
        WorkError: training failed; checkpoints are kept.
    """
    room = training_room()
    on_gpu = room.check(train.fewest_workers, use_gpu=train.use_gpu)
    for job in jobs:
        check_quantization(job.quantization, gpu=on_gpu)
        check_optimizer(job.train["optimizer"], gpu=on_gpu)
        if job.train["torch_compile"] is True and not on_gpu:
            check_compiler("train.torch_compile")
    machine = cluster_machine(train.fewest_workers, gpu=True) if on_gpu else None
    jobs = [fitted(job, machine) for job in jobs]
    cpus = cpus or room.cpus_per_worker(min(train.workers, room.workers(gpu=on_gpu)), gpu=on_gpu)
    place = RunFolder(folder)
    failure = place.ray / name / FAILURE_FILE
    wait, silent = 60 * cluster.node_wait_minutes, 60 * cluster.silent_minutes
    about = f"train {jobs[0].label}" if len(jobs) == 1 else "training workers"
    events = GroupEvents(
        place.events, about, failure, max_failures=train.max_failures, silent_seconds=silent, wait_seconds=wait
    )
    scaling: dict[str, Any] = {
        "num_workers": (train.min_workers, train.workers) if train.min_workers else train.workers,
        "elastic_resize_monitor_interval_s": RESIZE_SECONDS,
    }
    trainer = partial(
        TorchTrainer,
        train_worker,
        train_loop_config={"jobs": [asdict(job) for job in jobs], "failure": str(failure)},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo", timeout_s=COLLECTIVE_SECONDS),
        scaling_config=ray.train.ScalingConfig(
            **scaling,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": cpus} | ({"GPU": 1} if on_gpu else {}) | ({"train": 1} if room.pool else {}),
        ),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # ray.air's has no worker_runtime_env
            name=name,
            storage_path=str(place.ray),
            worker_runtime_env={"env_vars": worker_environment(on_gpu=on_gpu)},
            failure_config=failure_config(train.max_failures, wait_seconds=wait),
            callbacks=[events],  # type: ignore[list-item]  # Ray Train v2 takes callbacks for developers too
        ),
    )
    with (
        _following(jobs, progress),
        explained(failure, wait_seconds=wait, kept=place.models),
        ray_train_limits(silent_seconds=silent),
    ):
        has_left(failure.parent)  # a note of an earlier command
        while True:
            # Ray's own record of checkpoints points at ours, which say themselves what they hold; cut short, or of a
            # group that left, it would stop Ray
            (place.ray / name / SNAPSHOT).unlink(missing_ok=True)
            trainer().fit()
            if not has_left(failure.parent):
                return


def worker_environment(*, on_gpu: bool) -> dict[str, str]:
    """Environment variables of training workers: how memory is kept for the next step.

    Batches differ in size: on GPUs, blocks that grow leave no gaps between what one batch needed and the next one does.
    Settings of this process's environment are kept.
    """
    if not on_gpu:
        return ALLOCATOR
    name = "PYTORCH_ALLOC_CONF"
    return {} if name in os.environ or "PYTORCH_CUDA_ALLOC_CONF" in os.environ else {name: "expandable_segments:True"}


@contextmanager
def _following(jobs: list[TrainJob], progress: Progress) -> Iterator[None]:
    """Show the newest line of each job's metrics while the body runs."""
    stop = threading.Event()
    running = [job for job in jobs if not job.folder.model.exists()]
    checked: set[str] = set()
    for job in running:
        job.folder.start_check.unlink(missing_ok=True)  # of an earlier attempt

    def follow() -> None:
        while not stop.wait(0.5):
            _show_newest(running, progress, checked)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        _show_newest(running, progress, checked)


def _show_newest(running: list[TrainJob], progress: Progress, checked: set[str]) -> None:
    for job in running:
        if job.label not in checked and (line := start_line(job.folder)):
            checked.add(job.label)
            progress(f"start check of {job.label}", 0, 0, line)
        if job.label not in checked:
            continue  # the lines that are there are an earlier attempt's
        newest = newest_step(job.folder.metrics)
        if newest:
            set_training(job.folder.path.parents[1].name, job.label, newest)
            text = f"loss {newest['loss']:.4f}"
            if "rewards/accuracies" in newest:
                text += f", reward accuracy {newest['rewards/accuracies']:.2f}"
            progress(
                f"train {job.label}",
                newest["step"],
                job.total_steps,
                f"{text}, {newest['tokens_per_second']:,.0f} tokens/s",
            )
