"""The training loop inside a Ray Train worker, for every objective: supervised, pairs, labelled completions, rewards.

One worker group serves a list of jobs one after the other, because starting a group takes longer than a small job. A
finished job (its `model/` exists) is skipped; an interrupted one goes on from its newest complete checkpoint. So the
same list can be run again to resume it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from otpo.data.micro_batches import SIZES, TOKENS, micro_batches
from otpo.data.sampler import next_indices
from otpo.data.token_file import Item, Joined, column, load_tokens
from otpo.dtypes import torch_dtype
from otpo.errors import WorkError
from otpo.methods.spec import resolve
from otpo.models.checkpoint import (
    CheckpointWriter,
    check_whole,
    load_checkpoint,
    newest_whole_checkpoint,
    read_state,
)
from otpo.models.compiled import compile_layers
from otpo.models.disk.reloaded import trained_values
from otpo.models.export import export, other_precisions
from otpo.models.sharding import distribute, mesh_of
from otpo.ranks import from_rank_0, of_all_ranks
from otpo.records import SequenceBatch
from otpo.training.objectives import Start, objective_of
from otpo.training.objectives.reward import load_margins
from otpo.training.optimizer import adamw
from otpo.training.schedule import learning_rate, rows_in_step
from otpo.training.start_check import SHORTEST, choose_rows
from otpo.training.step import CoupledLosses, LossFunction, evaluate, optimisation_step
from pipeline.events.log import record
from pipeline.milestones.choice import JudgedChoice
from pipeline.milestones.judged import is_milestone
from pipeline.recipe import TrainConfig
from pipeline.train.faults.policy import writing_failures
from pipeline.train.faults.preemption import Leaving, Notices, leave
from pipeline.train.frozen_models import JobFrozenModels
from pipeline.train.job import TrainJob
from pipeline.train.job_start import JobStart
from pipeline.train.metrics_log import MetricsLog
from pipeline.train.saving import Saving


def train_worker(config: dict[str, Any]) -> None:
    """What Ray Train runs on every worker.

    Args:
        config: {"jobs": [TrainJob as a dict, ...], "failure": path of the failure file of `pipeline.train.faults`}.
    """
    failure = Path(config["failure"])
    if failure.exists():  # Ray has started the group again after an error that is not to be retried
        return
    with writing_failures(failure), suppress(Leaving):
        _run_jobs(config["jobs"], failure.parent)


def _run_jobs(jobs: list[dict[str, Any]], folder: Path) -> None:
    meshes: dict[str, DeviceMesh] = {}  # each has process groups of its own
    writers: dict[bool, CheckpointWriter] = {}  # and so has one that writes beside training
    for values in jobs:
        job = TrainJob(**values)
        if not job.folder.model.exists():
            sharding = job.train["sharding"]
            if sharding not in meshes:
                meshes[sharding] = _mesh(job)
            background = job.train["async_save"]
            if background not in writers:
                writers[background] = CheckpointWriter(background=background)
            _Trainer(job, folder, meshes[sharding], writers[background]).run()


def _mesh(job: TrainJob) -> DeviceMesh:
    """The mesh that a job shards over; nodes with different numbers of workers cannot each hold the model alike."""
    device, hybrid = ray.train.torch.get_device().type, job.train["sharding"] == "hybrid"
    nodes: dict[str, list[int]] = {}
    for rank, node in enumerate(of_all_ranks(ray.get_runtime_context().get_node_id() if hybrid else "")):
        nodes.setdefault(node, []).append(rank)
    if len({len(ranks) for ranks in nodes.values()}) == 1:
        return mesh_of(device, list(nodes.values()))
    if dist.get_rank() == 0:
        counts = " and ".join(str(len(ranks)) for ranks in nodes.values())
        text = f"nodes have {counts} workers: the model is sharded over all of them, not within each node"
        record(Path(job.events), f"train {job.label}", text)
    return mesh_of(device, [range(dist.get_world_size())])


class _Again:
    """Batches that are made anew each time they are gone over."""

    def __init__(self, begin: Callable[[], Iterator[SequenceBatch]]) -> None:
        self.begin = begin

    def __iter__(self) -> Iterator[SequenceBatch]:
        return self.begin()


class _Trainer:
    """One job on this rank. `folder` is the group's, where it leaves a note for the driver."""

    def __init__(self, job: TrainJob, folder: Path, mesh: torch.distributed.DeviceMesh, writer: CheckpointWriter):
        self.job, self.folder, self.mesh, self.writer = job, folder, mesh, writer
        self.notices = Notices()
        self.train = TrainConfig(**job.train)
        self.objective = objective_of(
            None if job.method is None else resolve(job.label, job.method),
            seed=self.train.seed,
            margins=load_margins(job.margins) if job.margins else None,
        )
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = ray.train.torch.get_device()
        self.budget = self.train.micro_batch_tokens or TOKENS[self.device.type]
        self.size = self.train.micro_batch_size or SIZES[self.device.type]
        self.items = load_tokens(job.tokens)
        self.validation = load_tokens(job.validation_tokens) if job.validation_tokens else []
        self.takes = tuple((each["items"], each["taken"]) for each in job.sets) or None
        self.epoch = sum(each["taken"] for each in job.sets) or len(self.items)
        self.metrics = MetricsLog(job.folder.metrics, writes=self.rank == 0)
        self.best: dict[str, Any] = {"value": None, "step": None, "since": 0}
        chosen_by = self.train.best_metric if self.train.selects_by_judge else None
        self.choice = JudgedChoice(job.folder, chosen_by, self.train.best_mode) if chosen_by else None

    def run(self) -> None:
        """Load or resume, train, export."""
        dtype = torch_dtype(self.train.dtype)
        model: Any = self.objective.load(
            Start(
                self.job.model,
                attn_implementation=self.job.attn_implementation,
                four_bit=dtype if self.job.quantization == "4bit" else None,
                lora=self.job.lora,
                seed=self.train.seed,
                pad_id=self.job.score_pad,
                deferred=self.world > 1,
            )
        )
        self.saved_dtype = model.lm.dtype
        self.others = {} if self.job.lora else other_precisions(model.lm)
        self.model = distribute(
            model, self.mesh, dtype=dtype, activation_checkpointing=self.train.activation_checkpointing is True
        )
        start = JobStart(self.job, self.model, self.objective, self.items, self.device, dtype=dtype, budget=self.budget)
        start.check_forward()
        if self.size is None and not self.model.backbone.shares_prompts:
            self.size = len(self.items)  # padded sequences of a micro-batch should be of similar length
        on_gpu = self.device.type == "cuda"
        compiles = on_gpu if self.train.torch_compile == "auto" else self.train.torch_compile
        if compiles:
            compile_layers(self.model)
        # only the adapters' dropout knows train mode (`otpo.models.backbone.set_mode`); at step 0 adapters add nothing
        self.model.train((self.job.lora or {}).get("lora_dropout", 0) > 0)
        self.optimizer = adamw(
            self.model,
            lr=self.train.learning_rate,
            weight_decay=self.train.weight_decay,
            name=self.train.optimizer,
        )
        frozen = JobFrozenModels(
            self.job,
            self.model,
            self.mesh,
            micro_batch_size=self.size,
            micro_batch_tokens=self.budget,
            prepare=start.check_frozen,
        )
        losses = self.objective.losses(self.model, Joined(self.items, self.validation), frozen)
        start.check_losses(losses, frozen, writes=self.rank == 0)
        step = self._resume()
        self.saving = Saving(self.job, self.train, self.model, self.optimizer, self.writer, start=step)
        while step < self.job.total_steps and not self._stalled():
            step = self._step(step, losses)
        self._finish(step)

    def _resume(self) -> int:
        checkpoint, remarks = newest_whole_checkpoint(self.job.folder.checkpoints)
        for remark in remarks:
            self._tell(f"{remark}; training goes on from {checkpoint.name if checkpoint else 'its start'}")
        if checkpoint is None:
            self.metrics.rewind(0)
            dist.barrier()
            return 0
        found = read_state(checkpoint)["reference"]
        if found != self.job.model_fingerprint:
            raise WorkError(
                f"{checkpoint} was trained from a model with fingerprint {found}, but {self.job.model} now has"
                f" {self.job.model_fingerprint}: its reference has changed. Put the model back, or take a new name."
            )
        state = load_checkpoint(checkpoint, self.model, self.optimizer)
        self.best = state["best"]
        self.metrics.rewind(state["step"])
        dist.barrier()
        self._tell(f"goes on from the checkpoint of step {state['step']}")
        return state["step"]

    def _tell(self, text: str) -> None:
        """Write an event, which the command shows. Rank 0 speaks for all."""
        if self.rank == 0:
            record(Path(self.job.events), f"train {self.job.label}", text)

    def _step(self, step: int, losses: LossFunction | CoupledLosses) -> int:
        self.saving.check()
        train, size = self.train, self.train.global_batch_size
        started = time.perf_counter()
        # a seed for each step: a resumed run draws the same random numbers as an uninterrupted one
        torch.manual_seed(train.seed * 1_000_003 + step)
        count = rows_in_step(step, self.epoch, global_batch_size=size, max_steps=train.max_steps, epochs=train.epochs)
        rows = next_indices(len(self.items), seed=train.seed, consumed=step * size, count=count, takes=self.takes)
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
                denominator=self.objective.denominator(members), max_grad_norm=train.max_grad_norm, lr=lr,
                reduce_each=self.device.type == "cuda",
            )  # fmt: skip
        seconds = time.perf_counter() - started
        step += 1
        due = self.saving.due(step)
        epoch = ((step - 1) * size + len(members)) / self.epoch
        self.metrics.log(
            {"step": step, "epoch": round(epoch, 4)}
            | figures
            | {"tokens_per_second": figures["tokens"] / seconds, "seconds": seconds}
        )
        if self.validation and train.eval_every and (step % train.eval_every == 0 or step == self.job.total_steps):
            self._evaluate(step, losses)
        if is_milestone(step, self.job.milestones, self.job.total_steps):
            self._export_milestone(step)
            self.best = self.choice.look(self.best) if self.choice else self.best
        leaves = step < self.job.total_steps and self.notices.imminent(seconds)
        if (due and step < self.job.total_steps) or leaves:
            self.saving.save(step, self.best)
        if leaves:
            self.saving.finish()
            self._tell(f"saved after step {step}, because a node will be taken away")
            leave(self.folder, step)
        return step

    def _batches(self, members: Sequence[Item], times: int = 1) -> Iterator[SequenceBatch]:
        """Micro-batches of this rank, `times` as large as in training."""
        for indices in micro_batches(
            column(members, "tokens").tolist(),
            size=self.size and times * self.size,
            budget=times * self.budget,
            rank=self.rank,
            world=self.world,
        ):
            items = [members[i] for i in indices] or [replace(members[0], row=-1)]  # padding: counts for nothing
            yield self.objective.collate(items).to(self.device)

    def _evaluate(self, step: int, losses: LossFunction | CoupledLosses) -> None:
        members = self.validation
        training = self.model.training
        self.model.eval()  # no dropout
        with self._naming(f"evaluation after step {step}"):
            figures = evaluate(
                _Again(lambda: self._batches(members, times=2)), losses,
                denominator=self.objective.denominator(members),
                sets={each["name"]: tuple(each["rows"]) for each in self.job.sets},
            )  # fmt: skip
        self.model.train(training)
        self.metrics.log({"step": step} | figures)
        name = self.train.best_metric
        if name is None or self.choice:
            return
        if name not in figures:
            raise WorkError(f"train.best_metric is '{name}', but an evaluation gives: {', '.join(sorted(figures))}.")
        better = {"min": float.__lt__, "max": float.__gt__}[self.train.best_mode]
        if self.best["value"] is None or better(float(figures[name]), float(self.best["value"])):
            self.best = {"value": figures[name], "step": step, "since": 0}
            self.saving.save(step, self.best)
        else:
            self.best = self.best | {"since": self.best["since"] + 1}

    def _stalled(self) -> bool:
        patience = self.train.early_stopping_patience
        return patience is not None and self.best["since"] >= patience

    def _finish(self, step: int) -> None:
        self.saving.finish()
        if self.choice:
            self._export_milestone(step)
            self.choice.take(self.choice.settle(self.best))
            return
        best = self.best["step"]
        if best is not None and best != step:
            path = self.job.folder.checkpoints / f"step-{best:06d}"
            if faults := check_whole(path):
                raise WorkError(
                    f"{self.job.label}: the best step is {best}, and its checkpoint {path} is not whole: {faults[0]}."
                    " Remove the label's folder to train it again, or unset train.best_metric to export the last step."
                )
            load_checkpoint(path, self.model, self.optimizer)
        self._export(self.job.folder.model, "export")

    def _export_milestone(self, step: int) -> None:
        """Export the model as it is now, unless an earlier attempt at this step has."""
        folder = self.job.folder.milestone(step)
        if not from_rank_0(folder.judged.exists() or folder.model.exists()):
            self._export(folder.model, f"export after step {step}")

    def _export(self, out: Path, what: str) -> None:
        rows = choose_rows(self.items, "cpu")[:SHORTEST]  # plain transformers computes them on a CPU
        four_bit = self.job.quantization == "4bit"  # merged into the weights before they were quantised
        dtype, batch = torch_dtype(self.train.dtype), self.objective.collate(rows).to(self.device)
        with self._naming(what):
            export(
                self.model, out, tokenizer=self.job.model, card=self.job.card,
                dtype=self.saved_dtype, others=self.others, pad_id=self.job.score_pad, template=self.job.template,
                trained=None if four_bit else trained_values(self.model, batch, dtype),
            )  # fmt: skip

    @contextmanager
    def _naming(self, when: str) -> Iterator[None]:
        """Add the label and the step to the message of a `WorkError`, and to any other error as a note."""
        try:
            yield
        except WorkError as error:
            raise WorkError(f"{self.job.label}, {when}: {error}") from error
        except Exception as error:
            error.add_note(f"{self.job.label}, {when}")
            raise
