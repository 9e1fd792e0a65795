"""From a recipe and its token ids to trained models: one Ray Train worker group for all jobs."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from transformers import AutoConfig

from otpo.errors import UserError, WorkError
from otpo.identity import model_fingerprint
from otpo.models.adapters import check_quantization
from otpo.models.attention import why_padded
from otpo.models.compiled import check_compiler
from pipeline.cluster.placement import check_workers, cpus_per_worker, node_pool, training_nodes
from pipeline.progress import Progress
from pipeline.recipe import ModelConfig, Recipe, TrainConfig
from pipeline.run.metrics import newest_step
from pipeline.train import model_card
from pipeline.train.tokens import Tokens
from pipeline.train.worker import FAILURE, TrainJob, total_steps, train_worker

# a group that cannot be placed is tried again every minute: say so rather than wait without end
CONTROLLER_FAILURES = 5

# glibc told to keep memory, in one arena (the loop runs in a thread) of huge pages: a step's large short-lived tensors
# otherwise cost more in page faults than in arithmetic.
CPU_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


def padded_batches(model: ModelConfig) -> list[str]:
    """A sentence about a model whose batches must be padded, which makes training slower."""
    why = why_padded(AutoConfig.from_pretrained(model.path).model_type, model.attn_implementation)
    return [f"Batches were padded and prompts computed once for each answer: {why}."] if why else []


def make_job(recipe: Recipe, folder: Path, label: str, *, model: ModelConfig, tokens: Tokens, caches: Path) -> TrainJob:
    """One label's job. `folder` is the run's, `caches` where those of frozen models are kept."""
    train = recipe.train_of(label)
    supervised = label == "base"
    fingerprint = model_fingerprint(model.path)
    spec = None if supervised else recipe.method(label)
    scores = spec is not None and "reward_head" in spec.method.needs
    tokens = tokens if spec is None else tokens.of(spec)
    models = {"reference": model.path} if spec and "reference" in spec.method.needs else {}
    for name, scorer in (spec.frozen_models if spec else {}).items():
        models[name] = str(folder / "models" / scorer / "model") if scorer in recipe.methods else scorer
    return TrainJob(
        label=label,
        model=model.path,
        model_fingerprint=fingerprint,
        attn_implementation=model.attn_implementation,
        tokens=tokens.train,
        validation_tokens=tokens.validation,
        out=str(folder / "models" / label),
        train=train.model_dump(),
        total_steps=total_steps(train, tokens.n_train),
        method=None if spec is None else spec.settings,
        frozen_models=models,
        caches=str(caches),
        tokens_hash=tokens.hash,
        card=model_card.model_card(recipe, label, start=model.path, train=train, spec=spec, report=tokens.report),
        margins=tokens.margins if scores else None,
        lora=model.lora.model_dump() if model.lora else None,
        quantization=model.quantization,
        score_pad=tokens.score_pad if scores else None,
    )


def fit(
    jobs: list[TrainJob], folder: Path, *, name: str, train: TrainConfig, progress: Progress, cpus: int | None = None
) -> None:
    """Run jobs on one Ray Train worker group, in order. What is finished already is not done again.

    Args:
        folder: of the run. name: of Ray Train's own folder below `folder/ray`. train: whose `workers`, `use_gpu` and
            `max_failures` hold for the group. cpus: a worker's share; by default the cluster is divided evenly.

    Raises:
        UserError: the cluster is too small. WorkError: training failed; checkpoints are kept.
    """
    on_gpu = check_workers(train.workers, use_gpu=train.use_gpu)
    for job in jobs:
        check_quantization(job.quantization, gpu=on_gpu)
        if job.train["torch_compile"] and not on_gpu:
            check_compiler("train.torch_compile")
    share = cpus or cpus_per_worker(train.workers, [int(node.get("CPU", 0)) for node in training_nodes()])
    failure = folder / "ray" / name / FAILURE
    failure.unlink(missing_ok=True)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"jobs": [asdict(job) for job in jobs], "failure": str(failure)},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=train.workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": share} | ({"GPU": 1} if on_gpu else {}) | node_pool("train"),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(folder / "ray"),
            worker_runtime_env={} if on_gpu else {"env_vars": CPU_ENVIRONMENT},
            failure_config=ray.train.FailureConfig(
                max_failures=train.max_failures,
                controller_failure_limit=CONTROLLER_FAILURES,  # type: ignore[call-arg]  # of Train's own version
            ),
        ),
    )
    with _following(jobs, progress), _interruptible():
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            if not failure.exists():
                raise WorkError(
                    f"Training failed {train.max_failures + 1} times; checkpoints are kept in {folder / 'models'}, and"
                    f" the same command goes on from them. The last failure: {_cause(error)}"
                ) from error
    if failure.exists():
        kind, message = json.loads(failure.read_text())
        raise {"UserError": UserError, "WorkError": WorkError}[kind](message)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ray Train takes SIGINT for itself, leaves with exit code 0 on it, and keeps the handler when it is done."""
    previous = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, previous)


def _cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    first: BaseException = next(iter(failures.values()), error)
    return str(first).strip().splitlines()[-1] if str(first).strip() else repr(first)


@contextmanager
def _following(jobs: list[TrainJob], progress: Progress) -> Iterator[None]:
    """Show the newest line of each job's metrics while the body runs."""
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(0.5):
            _show_newest(jobs, progress)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        _show_newest(jobs, progress)


def _show_newest(jobs: list[TrainJob], progress: Progress) -> None:
    for job in jobs:
        line = newest_step(job.folder / "metrics.jsonl")
        if line:
            text = f"loss {line['loss']:.4f}"
            if "rewards/accuracies" in line:
                text += f", reward accuracy {line['rewards/accuracies']:.2f}"
            progress(
                f"train {job.label}",
                line["step"],
                job.total_steps,
                f"{text}, {line['tokens_per_second']:,.0f} tokens/s",
            )
