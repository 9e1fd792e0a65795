"""From a recipe to trained models: check everything, tokenise once, then one Ray Train worker group for all jobs."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from otpo.batches import save_tokens, split_validation, tokens_hash
from otpo.data import DataReport, read_rows
from otpo.errors import UserError, WorkError
from otpo.identity import model_fingerprint
from otpo.records import TokenCompletion, TokenPair
from otpo.tokens import load_tokenizer, pad_id, tokenize_completions, tokenize_pairs
from pipeline import cards
from pipeline.cluster import check_workers, cpus_per_worker
from pipeline.config import ModelConfig, Recipe, TrainConfig
from pipeline.scorers import cache_folder
from pipeline.worker import FAILURE, TrainJob, total_steps, train_worker

Show = Callable[[str, int, int, str], None]
"""Progress of one piece of work: (what, done, total, a few words)."""


@dataclass(frozen=True)
class Tokens:
    """A data file as the workers read it."""

    train: str
    validation: str | None
    n_train: int
    pad_id: int
    hash: str
    report: DataReport


def prepare_tokens(recipe: Recipe, folder: Path, *, model: str, source: str, supervised: bool) -> Tokens:
    """Read, check and tokenise a data file; write it where all workers can map it.

    Raises:
        UserError: the file, the tokenizer or the rows cannot be used.
    """
    tokenizer = load_tokenizer(model)
    rows = read_rows(source, recipe.data.split)
    if recipe.data.limit and not supervised:
        rows = rows[: recipe.data.limit]
    tokenize = tokenize_completions if supervised else tokenize_pairs
    items, report = tokenize(
        rows, tokenizer, template=recipe.data.template, max_length=recipe.data.max_length,
        max_prompt_length=recipe.data.max_prompt_length, truncation=recipe.data.truncation, source=source,
    )  # fmt: skip
    key = tokens_hash(items)[:16]
    validation: list[TokenPair] | list[TokenCompletion] = []
    wanted = recipe.data.validation
    if wanted and not supervised:
        share = {"fraction": wanted} if wanted < 1 else {"count": int(wanted)}
        items, validation = split_validation(items, **share, seed=recipe.train.seed)
    target = folder / "data" / f"{key}-{recipe.train.seed}-{wanted}"
    save_tokens(target / "train.safetensors", items)
    if validation:
        save_tokens(target / "validation.safetensors", validation)
    (target / "report.json").write_text(json.dumps(report.to_dict(), indent=1))
    return Tokens(
        train=str(target / "train.safetensors"),
        validation=str(target / "validation.safetensors") if validation else None,
        n_train=len(items),
        pad_id=pad_id(tokenizer),
        hash=key,
        report=report,
    )


def make_job(
    recipe: Recipe, folder: Path, label: str, *, model: ModelConfig, tokens: Tokens, scorers: Path
) -> TrainJob:
    """One label's job. `folder` is the run's, `scorers` where caches of frozen models are kept."""
    train = recipe.train_of(label)
    supervised = label == "base"
    fingerprint = model_fingerprint(model.path)
    spec = None if supervised else recipe.method(label)
    cache = cache_folder(scorers, model=fingerprint, dtype=train.dtype, tokens=tokens.hash)
    needed = sorted({"reference"} & spec.method.needs) if spec else []
    return TrainJob(
        label=label,
        model=model.path,
        model_fingerprint=fingerprint,
        attn_implementation=model.attn_implementation,
        pad_id=tokens.pad_id,
        tokens=tokens.train,
        validation_tokens=tokens.validation,
        out=str(folder / "models" / label),
        train=train.model_dump(),
        total_steps=total_steps(train, tokens.n_train),
        method=None if spec is None else {"method": spec.method.name, **spec.hyperparameters},
        scorers={name: str(cache) for name in needed},
        card=cards.model_card(recipe, label, start=model.path, train=train, spec=spec, report=tokens.report),
    )


def fit(
    jobs: list[TrainJob], folder: Path, *, name: str, train: TrainConfig, show: Show, cpus: int | None = None
) -> None:
    """Run jobs on one Ray Train worker group, in order. What is finished already is not done again.

    Args:
        folder: of the run. name: of Ray Train's own folder below `folder/ray`. train: whose `workers`, `use_gpu` and
            `max_failures` hold for the group. cpus: a worker's share; by default the cluster is divided evenly.

    Raises:
        UserError: the cluster is too small. WorkError: training failed; checkpoints are kept.
    """
    on_gpu = check_workers(train.workers, use_gpu=train.use_gpu)
    failure = folder / "ray" / name / FAILURE
    failure.unlink(missing_ok=True)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"jobs": [asdict(job) for job in jobs], "failure": str(failure)},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=train.workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": cpus or cpus_per_worker(train.workers)} | ({"GPU": 1} if on_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(folder / "ray"),
            failure_config=ray.train.FailureConfig(max_failures=train.max_failures),
        ),
    )
    with _following(jobs, show):
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise WorkError(f"Training failed {train.max_failures + 1} times; checkpoints are kept in {folder / 'models'}, and the same"
                            f" command goes on from them. The last failure: {_cause(error)}") from error  # fmt: skip
    if failure.exists():
        kind, message = json.loads(failure.read_text())
        raise {"UserError": UserError, "WorkError": WorkError}[kind](message)


def _cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    first: BaseException = next(iter(failures.values()), error)
    return str(first).strip().splitlines()[-1] if str(first).strip() else repr(first)


@contextmanager
def _following(jobs: list[TrainJob], show: Show):
    """Show the newest line of each job's metrics while the body runs."""
    stop = threading.Event()

    def follow() -> None:
        while not stop.wait(0.5):
            _show_newest(jobs, show)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        _show_newest(jobs, show)


def _show_newest(jobs: list[TrainJob], show: Show) -> None:
    for job in jobs:
        line = newest_step(job.folder / "metrics.jsonl")
        if line:
            text = f"loss {line['loss']:.4f}"
            if "rewards/accuracies" in line:
                text += f", reward accuracy {line['rewards/accuracies']:.2f}"
            show(
                f"train {job.label}",
                line["step"],
                job.total_steps,
                f"{text}, {line['tokens_per_second']:,.0f} tokens/s",
            )


def newest_step(metrics: Path) -> dict[str, Any] | None:
    """The last complete training line of a `metrics.jsonl`, read from its end."""
    if not metrics.exists():
        return None
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 8192))
        lines = file.read().decode(errors="replace").split("\n")[:-1]
    for text in reversed(lines):
        if text.startswith("{") and '"loss"' in text:
            return json.loads(text)
    return None
