"""The training loop inside a Ray Train worker: supervised base training, every preference method, reward models.

One worker group serves a list of jobs one after the other, because starting the group costs more than a small job. A
job that is finished (its `model/` exists) is skipped, one that was interrupted goes on from its newest complete
checkpoint: rerunning the same list is how a run resumes.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from otpo.data.collate import collate_completions, collate_pairs
from otpo.data.sampler import next_indices
from otpo.data.token_file import Item, load_tokens
from otpo.data.unpaired import UnpairedBatch, as_pairs, collate_unpaired
from otpo.errors import UserError, WorkError
from otpo.files import write_atomically
from otpo.identity import model_fingerprint
from otpo.methods.spec import resolve
from otpo.models.adapters import AdaptersOff, add_adapters
from otpo.models.checkpoint import (
    complete_checkpoints,
    export,
    load_checkpoint,
    prune_checkpoints,
    read_state,
    save_checkpoint,
)
from otpo.models.compiled import compile_layers
from otpo.models.policy import PolicyModel, distribute, load_causal_lm
from otpo.models.reward_model import RewardModel, load_margins, load_reward_lm, reward_losses
from otpo.records import SequenceBatch, TokenCompletion, TokenPair
from otpo.training.step import (
    CoupledLosses,
    LossFunction,
    Reference,
    adamw,
    evaluate,
    learning_rate,
    micro_batches,
    optimisation_step,
    preference_losses,
    supervised_losses,
)
from otpo.training.unpaired import unpaired_losses
from pipeline.recipe import TrainConfig
from pipeline.train.frozen_cache import FrozenLogProbs, agree_missing, cache_folder, fill_cache
from pipeline.train.metrics_log import MetricsLog

FAILURE = "failure.json"
MICRO_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}  # enough for large products; more would take memory alone
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class TrainJob:
    """One model to train, as plain values that travel to the workers.

    Attributes:
        label: names the model and its folder. model: folder or hub name of the start, which is also the reference.
        model_fingerprint: identity of that start, kept in every checkpoint: resuming must not move the reference.
        tokens, validation_tokens: files of token ids: pairs, or completions (labelled ones for methods that need
            "unpaired").
        out: `models/<label>`. train: a `TrainConfig`. method: None for supervised training, else settings of the label.
        frozen_models: name of a frozen model -> its folder or hub name. caches: where their log-probabilities are kept.
        tokens_hash: of the token ids of all rows. total_steps: of the whole job.
        lora: settings of adapters, which alone are trained then. quantization: of the other weights.
        margins: for a reward model, the file of its pairs' margins if they have any.
        score_pad: for a reward model, what its answers are padded with (`otpo.models.reward_model.pad_token`).
    """

    label: str
    model: str
    model_fingerprint: str
    attn_implementation: str
    tokens: str
    validation_tokens: str | None
    out: str
    train: dict[str, Any]
    total_steps: int
    method: dict[str, Any] | None
    frozen_models: dict[str, str]
    caches: str
    tokens_hash: str
    card: str
    lora: dict[str, Any] | None = None
    quantization: str = "none"
    margins: str | None = None
    score_pad: int | None = None

    @property
    def folder(self) -> Path:
        """`models/<label>`."""
        return Path(self.out)


def train_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs on every worker.

    Args:
        config: {"jobs": [TrainJob as a dict, ...], "failure": where to write an error that a retry would meet again}.
    """
    failure = Path(config["failure"])
    if failure.exists():
        return
    try:
        _run_jobs(config["jobs"])
    except (UserError, WorkError) as error:
        write_atomically(failure, json.dumps([type(error).__name__, str(error)]))
        raise


def _run_jobs(jobs: list[dict[str, Any]]) -> None:
    context = ray.train.get_context()
    mesh = init_device_mesh(ray.train.torch.get_device().type, (context.get_world_size(),))
    for values in jobs:
        job = TrainJob(**values)
        if not (job.folder / "model").exists():
            _Trainer(job, mesh).run()


class _Trainer:
    """One job on this rank."""

    def __init__(self, job: TrainJob, mesh: torch.distributed.DeviceMesh):
        self.job, self.mesh = job, mesh
        self.train = TrainConfig(**job.train)
        self.spec = None if job.method is None else resolve(job.label, job.method)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = ray.train.torch.get_device()
        self.budget = self.train.micro_batch_tokens or MICRO_BATCH_TOKENS[self.device.type]
        self.items = load_tokens(job.tokens)
        self.validation = load_tokens(job.validation_tokens) if job.validation_tokens else []
        self.metrics = MetricsLog(job.folder / "metrics.jsonl", writes=self.rank == 0)
        self.best: dict[str, Any] = {"value": None, "step": None, "since": 0}
        self.saved = 0

    def run(self) -> None:
        """Load or resume, train, export."""
        model = self._start()
        self.saved_dtype = model.lm.dtype
        self.model = distribute(
            model,
            self.mesh,
            dtype=DTYPES[self.train.dtype],
            activation_checkpointing=self.train.activation_checkpointing,
        )
        if self.train.torch_compile:
            compile_layers(self.model)
        # eval mode: no dropout, the policy at step 0 is the reference exactly; checkpointing needs train mode, and so
        # does the dropout of adapters, which at step 0 add nothing
        dropout = (self.job.lora or {}).get("lora_dropout", 0)
        self.model.train(self.train.activation_checkpointing or dropout > 0)
        self.optimizer = adamw(self.model, lr=self.train.learning_rate, weight_decay=self.train.weight_decay)
        losses = self._losses()
        step = self._resume()
        while step < self.job.total_steps and not self._stalled():
            step = self._step(step, losses)
        self._finish(step)

    def _start(self) -> PolicyModel:
        path, attention = self.job.model, self.job.attn_implementation
        if self.spec is None or "reward_head" not in self.spec.method.needs:
            four_bit = DTYPES[self.train.dtype] if self.job.quantization == "4bit" else None
            lm = load_causal_lm(path, attn_implementation=attention, four_bit=four_bit)
            return PolicyModel(lm if self.job.lora is None else add_adapters(lm, self.job.lora, seed=self.train.seed))
        pad = self.job.score_pad
        return RewardModel(load_reward_lm(path, new_head=True, pad_id=pad, attn_implementation=attention))

    def _losses(self) -> LossFunction | CoupledLosses:
        spec = self.spec
        if spec is None:
            return supervised_losses(self.model)
        if isinstance(self.model, RewardModel):
            return reward_losses(self.model, spec, load_margins(self.job.margins) if self.job.margins else None)
        tables = {name: self._scores(model) for name, model in self.job.frozen_models.items()}
        if "unpaired" in spec.method.needs:

            def reference(batch: UnpairedBatch) -> tuple[Tensor, Tensor]:
                keys, table = batch.keys, tables["reference"]
                return table.side(keys, 0, batch.mask), table.side(keys, 1, batch.mismatched.mask)

            return unpaired_losses(self.model, spec, reference)
        return preference_losses(
            self.model,
            spec,
            lambda batch: {name: table.batch(batch) for name, table in tables.items()},
            seed=self.train.seed,
            reference=self._live_reference() if "reference_kl" in spec.method.needs else None,
        )

    def _live_reference(self) -> Reference:
        """The start beside the policy: its whole distribution over the vocabulary is too large to keep."""
        if self.job.lora is not None:
            return AdaptersOff(self.model)
        return self._frozen(self.job.model, keep_head=True)

    def _scores(self, model: str) -> FrozenLogProbs:
        """The log-probabilities of a frozen model, computed where they are not in its cache yet."""
        ours = model == self.job.model  # the policy has not moved yet: it is the reference
        fingerprint: list[Any] = [self.job.model_fingerprint if ours else None]
        if not ours:  # a label that an earlier job of this list trained has no fingerprint before
            fingerprint = [model_fingerprint(model) if self.rank == 0 else None]
            dist.broadcast_object_list(fingerprint)
        elif self.job.quantization != "none":
            fingerprint[0] += f"-{self.job.quantization}"
        folder = cache_folder(
            Path(self.job.caches), model=fingerprint[0], dtype=self.train.dtype, tokens=self.job.tokens_hash
        )
        items = [*self.items, *self.validation]
        unpaired = as_pairs([item for item in items if isinstance(item, TokenCompletion)])
        pairs = unpaired or [item for item in items if isinstance(item, TokenPair)]
        if ours or agree_missing(FrozenLogProbs(folder).missing(pairs), pairs):
            fill_cache(
                folder, self.model if ours else self._frozen(model), pairs,
                micro_batch_size=self.train.micro_batch_size, micro_batch_tokens=self.budget,
                rank=self.rank, world=self.world,
            )  # fmt: skip
            dist.barrier()
        return FrozenLogProbs(folder)

    def _frozen(self, path: str, *, keep_head: bool = False) -> PolicyModel:
        """Another model beside the policy, which is not trained."""
        lm = load_causal_lm(path, attn_implementation=self.job.attn_implementation)
        ours, theirs = self.model.lm.config.vocab_size, lm.config.vocab_size
        if ours != theirs:
            raise UserError(
                f"{self.job.label}: the frozen model {path} has a vocabulary of {theirs} tokens, the policy"
                f" {self.job.model} one of {ours}: they must share one tokenizer."
            )
        model = distribute(PolicyModel(lm), self.mesh, dtype=DTYPES[self.train.dtype], keep_head=keep_head)
        return model.requires_grad_(False).eval()

    def _resume(self) -> int:
        checkpoints = complete_checkpoints(self.job.folder / "checkpoints")
        if not checkpoints:
            self.metrics.rewind(0)
            dist.barrier()
            return 0
        found = read_state(checkpoints[-1])["reference"]
        if found != self.job.model_fingerprint:
            raise WorkError(
                f"{checkpoints[-1]} was trained from a model with fingerprint {found}, but {self.job.model} now has"
                f" {self.job.model_fingerprint}: its reference has changed. Put the model back, or take a new name."
            )
        state = load_checkpoint(checkpoints[-1], self.model, self.optimizer)
        self.best = state["best"]
        self.metrics.rewind(state["step"])
        dist.barrier()
        return state["step"]

    def _step(self, step: int, losses: LossFunction | CoupledLosses) -> int:
        train, size = self.train, self.train.global_batch_size
        started = time.perf_counter()
        # randomness is a function of the step alone, so that a resumed run draws what an undisturbed one draws
        torch.manual_seed(train.seed * 1_000_003 + step)
        rows = next_indices(len(self.items), seed=train.seed, consumed=step * size, count=self._batch_size(step))
        members = [self.items[i] for i in rows]
        lr = learning_rate(
            step,
            self.job.total_steps,
            train.learning_rate,
            scheduler=train.lr_scheduler,
            warmup_ratio=train.warmup_ratio,
        )
        with self._naming(f"step {step + 1}"):
            figures = optimisation_step(
                self.model, self.optimizer, self._batches(members), losses,
                denominator=self._denominator(members), max_grad_norm=train.max_grad_norm, lr=lr,
            )  # fmt: skip
        seconds = time.perf_counter() - started
        step += 1
        epoch = ((step - 1) * size + len(members)) / len(self.items)
        self.metrics.log(
            {"step": step, "epoch": round(epoch, 4)}
            | figures
            | {"tokens_per_second": figures["tokens"] / seconds, "seconds": seconds}
        )
        if self.validation and train.eval_every and (step % train.eval_every == 0 or step == self.job.total_steps):
            self._evaluate(step, losses)
        if train.save_every and step % train.save_every == 0 and step < self.job.total_steps:
            self._save(step)
        return step

    def _batch_size(self, step: int) -> int:
        """Rows in this step; the last one of an `epochs` run holds what is left: each row is seen equally often."""
        size = self.train.global_batch_size
        if self.train.max_steps is not None:
            return size
        return min(size, round(self.train.epochs * len(self.items)) - step * size)

    def _batches(self, members: Sequence[Item], times: int = 1) -> Iterator[SequenceBatch]:
        """Micro-batches of this rank, `times` as large as in training."""
        collate: Callable[..., SequenceBatch] = collate_pairs
        if isinstance(members[0], TokenCompletion):
            collate = collate_completions if self.spec is None else collate_unpaired
        for indices in micro_batches(
            [item.tokens for item in members],
            size=times * self.train.micro_batch_size,
            budget=times * self.budget,
            rank=self.rank,
            world=self.world,
        ):
            items = [members[i] for i in indices] or [replace(members[0], row=-1)]
            yield collate(items).to(self.device)

    def _denominator(self, members: Sequence[Item]) -> float:
        """Tokens for supervised training, else pairs or labelled completions."""
        if self.spec is not None:
            return float(len(members))
        return float(sum(len(m.completion_ids) for m in members if isinstance(m, TokenCompletion)))

    def _evaluate(self, step: int, losses: LossFunction | CoupledLosses) -> None:
        members = list(self.validation)
        training = self.model.training
        self.model.eval()  # no dropout
        with self._naming(f"evaluation after step {step}"):
            figures = evaluate(self._batches(members, times=2), losses, denominator=self._denominator(members))
        self.model.train(training)
        self.metrics.log({"step": step} | figures)
        name = self.train.best_metric
        if name is None:
            return
        if name not in figures:
            raise WorkError(f"train.best_metric is '{name}', but an evaluation gives: {', '.join(sorted(figures))}.")
        better = {"min": float.__lt__, "max": float.__gt__}[self.train.best_mode]
        if self.best["value"] is None or better(float(figures[name]), float(self.best["value"])):
            self.best = {"value": figures[name], "step": step, "since": 0}
            self._save(step)
        else:
            self.best = self.best | {"since": self.best["since"] + 1}

    def _stalled(self) -> bool:
        patience = self.train.early_stopping_patience
        return patience is not None and self.best["since"] >= patience

    def _save(self, step: int) -> None:
        folder = self.job.folder / "checkpoints"
        state = {
            "step": step,
            "best": self.best,
            "reference": self.job.model_fingerprint,
            "label": self.job.label,
            "world": self.world,
        }
        if step == self.saved:
            return  # as the best one, a moment ago
        self.saved = step
        path = save_checkpoint(folder, self.model, self.optimizer, state)
        if self.rank == 0:
            prune_checkpoints(folder, self.train.keep_checkpoints, self.best["step"])
        self._report(step, path)

    def _report(self, step: int, path: Path) -> None:
        """Tell Ray; its checkpoint is a pointer, since the shards already lie on the run's own storage."""
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if self.rank == 0:
                (Path(folder) / "pointer.json").write_text(
                    json.dumps({"path": str(path), "label": self.job.label, "step": step})
                )
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"label": self.job.label, "step": step}, checkpoint=checkpoint)

    def _finish(self, step: int) -> None:
        best = self.best["step"]
        if best is not None and best != step:
            load_checkpoint(self.job.folder / "checkpoints" / f"step-{best:06d}", self.model, self.optimizer)
        export(
            self.model, self.job.folder / "model", tokenizer=self.job.model, card=self.job.card,
            dtype=self.saved_dtype, pad_id=self.job.score_pad,
        )  # fmt: skip

    @contextmanager
    def _naming(self, when: str) -> Iterator[None]:
        """Say of what goes wrong inside which label's it was, and when."""
        try:
            yield
        except WorkError as error:
            raise WorkError(f"{self.job.label}, {when}: {error}") from error


def total_steps(train: TrainConfig, items: int) -> int:
    """Steps of a job over `items` rows: `max_steps` if given, else enough for `epochs`."""
    if train.max_steps is not None:
        return train.max_steps
    return max(1, math.ceil(round(train.epochs * items) / train.global_batch_size))
