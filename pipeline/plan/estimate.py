"""Memory and time of one label on a machine: with the recipe's settings, and with the fastest ones that fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from otpo.data.micro_batches import SIZES, TOKENS
from otpo.methods.spec import MethodSpec
from otpo.training.optimizer import ADAMW, EIGHT_BIT, STATE_BYTES
from otpo.training.schedule import total_steps
from pipeline.plan.lengths import Lengths
from pipeline.plan.machine import Machine
from pipeline.plan.memory import Load, memory_parts
from pipeline.plan.shape import Shape
from pipeline.plan.speed import frozen_seconds, model_flops, step_seconds
from pipeline.recipe import ModelConfig, TrainConfig
from pipeline.recipe.sections import SAVING_SHARE

FULL_SPEED = 8192  # tokens of a micro-batch from which on larger ones are hardly faster
BUDGETS = (65536, 32768, 16384, 8192, 4096, 2048, 1024)


@dataclass(frozen=True)
class Settings:
    """How a worker divides its rows, and workers the model: the recipe's keys of the same names.

    `micro_batch_size` None: no limit. `hybrid`: whether `sharding` is.
    """

    micro_batch_tokens: int
    activation_checkpointing: bool
    micro_batch_size: int | None = None
    hybrid: bool = False


@dataclass(frozen=True)
class Estimate:
    """A worker's peak memory, and the time of a step, with some settings.

    Attributes:
        parts: bytes by part (`pipeline.plan.memory`).
        micro_batches: of a worker in a step.
        step_seconds: None on CPUs, as are the next three.
        computing: share of a step in which weights and gradients are not waited for.
        tokens_per_second: of a GPU, as training reports them: a prompt counts with each of its completions.
        mfu: share of the GPU's peak that the model's own operations reach.
    """

    settings: Settings
    parts: dict[str, int]
    micro_batches: int
    step_seconds: float | None = None
    computing: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Case:
    """One label of a recipe on a machine.

    Attributes:
        model: `model` of the recipe. train: the label's own. spec: its method; None for supervised training.
    """

    model: ModelConfig
    train: TrainConfig
    spec: MethodSpec | None
    shape: Shape
    machine: Machine
    lengths: Lengths

    def fits(self, estimate: Estimate) -> bool:
        """Whether the workers of a node fit its memory, or a worker its GPU; True where the memory is unknown."""
        workers = 1 if self.machine.gpu else self.machine.per_node
        return self.machine.memory is None or estimate.total * workers <= self.machine.memory

    @property
    def dtype_bytes(self) -> int:
        """Of a number in the precision of the computation."""
        return {"fp32": 4, "bf16": 2}[self.train.dtype]

    @property
    def rows(self) -> int:
        """Rows of a worker in a step."""
        return math.ceil(self.train.global_batch_size / self.machine.ranks)

    @property
    def row_tokens(self) -> float:
        """Mean tokens that the model computes for a row."""
        return self.lengths.row(shared=self.shape.shares_prompts)

    def asked(self) -> Estimate:
        """With the settings of the recipe.

        Where it leaves activation checkpointing open, a GPU computes activations again if they do not fit without. If
        the tokens of a micro-batch are open too, fewer are tried first, down to `FULL_SPEED`.
        """
        train = self.train
        device = "cuda" if self.machine.gpu else "cpu"
        tokens, size = train.micro_batch_tokens or TOKENS[device], train.micro_batch_size or SIZES[device]
        if train.activation_checkpointing != "auto" or self.machine.gpu is None:
            return self._sharded(Settings(tokens, train.activation_checkpointing is True, size))
        fewer = [budget for budget in BUDGETS if FULL_SPEED <= budget < tokens]
        budgets = [tokens, *([] if train.micro_batch_tokens else fewer)]
        ways = [(again, budget) for again in (False, True) for budget in budgets if not again or self.shape.recomputes]
        for again, budget in ways:
            found = self._sharded(Settings(budget, again, size))
            if self.fits(found):
                break
        return found

    def _sharded(self, settings: Settings) -> Estimate:
        """With some settings, sharded as the recipe says; by itself within each node, where that fits."""
        if self.machine.nodes == 1 or self.train.sharding == "full" or self.machine.gpu is None:
            return self.estimate(settings)
        hybrid = self.estimate(replace(settings, hybrid=True))
        return hybrid if self.train.sharding == "hybrid" or self.fits(hybrid) else self.estimate(settings)

    def estimate(self, settings: Settings) -> Estimate:
        """With some settings."""
        load, machine = self.load(settings), self.machine
        shards = machine.per_node if settings.hybrid else machine.ranks
        parts = memory_parts(self.shape, load, shards, "cuda" if machine.gpu else "cpu")
        if machine.gpu is None:
            return Estimate(settings, parts, load.micro_batches)
        rows = self.train.global_batch_size
        computing, moving = step_seconds(self.shape, load, self.lengths, machine, rows, hybrid=settings.hybrid)
        seconds = max(computing, moving)
        rate = rows / machine.ranks / seconds
        return Estimate(
            settings,
            parts,
            load.micro_batches,
            step_seconds=seconds,
            computing=computing / seconds,
            tokens_per_second=rate * self.lengths.counted,
            mfu=rate
            * model_flops(self.shape, self.lengths, adapters=load.adapters)
            / machine.gpu.peak(load.dtype_bytes),
        )

    def load(self, settings: Settings) -> Load:
        """What a worker holds at a time. The largest micro-batch holds the longest rows."""
        size = min(self.rows, settings.micro_batch_size or self.rows)
        longest = max(self.lengths.longest, self.row_tokens)
        tokens = min(size * longest, max(settings.micro_batch_tokens, longest))
        needs = self.spec.method.needs if self.spec else frozenset()
        scores = self.spec is not None and self.spec.method.objective == "reward"
        completions = self.lengths.completion * self.lengths.completions / self.row_tokens
        return Load(
            dtype_bytes=self.dtype_bytes,
            adapters=self.model.lora is not None,
            four_bit=self.model.quantization == "4bit",
            live_reference="reference_kl" in needs,
            states="hidden" in needs,
            tokens=int(tokens),
            sequence_tokens=int(tokens * self.lengths.counted / self.row_tokens),
            completion_tokens=0 if scores else int(tokens * completions),
            micro_batches=math.ceil(self.rows / min(size, max(1, settings.micro_batch_tokens / self.row_tokens))),
            checkpointing=settings.activation_checkpointing,
            compiled=self.machine.gpu is not None and self.train.torch_compile is not False,
            state_bytes=STATE_BYTES[self.train.optimizer],
            pair_tokens=int(longest * completions),
            first_pass=self.spec is not None and self.spec.method.loss.collects is not None,
        )

    def choose(self) -> Estimate | None:
        """The largest micro-batches that fit; activation checkpointing where they would be small without it.

        Computing activations again costs a third of a step, micro-batches of fewer than 8,192 tokens cost more.

        Returns:
            None where nothing fits.
        """
        # a fifth more than the mean, since one worker's rows may be longer than another's
        most = max(int(1.2 * self.rows * self.row_tokens), self.lengths.longest)
        budgets = [most, *(budget for budget in BUDGETS if budget < most)]
        for checkpointing in (False, True) if self.shape.recomputes else (False,):
            for budget in budgets:
                if checkpointing or budget >= min(FULL_SPEED, most):
                    found = self._sharded(Settings(budget, checkpointing))
                    if self.fits(found):
                        return found
        return None

    def steps(self) -> int:
        """Optimizer steps."""
        train = self.train
        size = train.global_batch_size
        return total_steps(self.lengths.rows, global_batch_size=size, max_steps=train.max_steps, epochs=train.epochs)

    def seconds(self, step: float, checkpoint: float) -> float:
        """Of all steps, and of the checkpoints beside them.

        Args:
            step, checkpoint: seconds of one.
        """
        steps, every, minutes = self.steps(), self.train.save_every, self.train.save_minutes
        saved = 0
        if every:
            saved = steps // every
        elif minutes is not None:
            saved = int(steps * step / max(60 * minutes, SAVING_SHARE * checkpoint))
        return steps * step + saved * checkpoint

    def frozen_seconds(self) -> dict[tuple[str, str, str], float]:
        """Of what frozen models are asked once, before the first step; what labels ask alike has one key."""
        if self.spec is None:
            return {}
        method, named = self.spec.method, self.spec.frozen_models.values()
        names = {*named, *(["reference"] if named or "reference" in method.needs else [])}
        # KTO asks about a completion of another prompt beside each
        lengths = replace(self.lengths, completions=2) if method.objective == "unpaired" else self.lengths
        seconds = frozen_seconds(self.shape, lengths, self.machine, self.dtype_bytes) if names else 0.0
        return {(name, method.objective, self.train.dtype): seconds for name in names}

    def advice(self, chosen: Estimate | None) -> list[str]:
        """What would make it fit, first what costs least, each with the other settings that it takes."""
        found: list[str] = []

        def propose(words: str, case: Case, joint: str = " ") -> bool:
            best = case.choose()
            if best is None:
                return False
            more = "" if case.fits(case.asked()) else joint + " ".join(case._changes(best))
            found.append(f"{words}{more}: {_gib(best)}")
            return True

        if chosen is not None:
            found.append(f"{' '.join(self._changes(chosen))}: {_gib(chosen)}")
        elif self.machine.gpu is not None:
            if self.train.optimizer == ADAMW and not self.train.async_save:
                update = {"optimizer": EIGHT_BIT}
                propose(f"train.optimizer={EIGHT_BIT}", replace(self, train=self.train.model_copy(update=update)))
            if larger := self._larger():
                propose(f"more GPUs, {larger.machine}", larger, " with ")
        if self.model.lora is None and (self.spec is None or self.spec.method.objective != "reward"):
            ways: list[tuple[str, dict[str, Any]]] = [("model.lora={}", {})]
            if self.machine.gpu is not None:  # CPUs do not compute with 4-bit weights
                ways.append(("model.lora={} model.quantization=4bit", {"quantization": "4bit"}))
            for words, more in ways:
                if propose(words, replace(self, model=ModelConfig(**self.model.model_dump() | {"lora": {}} | more))):
                    break
        return found

    def _changes(self, chosen: Estimate) -> list[str]:
        """The recipe's keys by which it is trained as in an estimate."""
        settings = chosen.settings
        changes = [f"train.micro_batch_tokens={settings.micro_batch_tokens}"]
        if settings.activation_checkpointing and self.train.activation_checkpointing is False:
            changes.insert(0, "train.activation_checkpointing=true")
        if self.train.micro_batch_size is not None:
            changes.append(f"train.micro_batch_size={math.ceil(settings.micro_batch_tokens / self.row_tokens)}")
        return changes

    def _larger(self) -> Case | None:
        """With as many times more nodes as it takes."""
        case = self
        while case.machine.ranks < 2048:
            case = replace(case, machine=replace(case.machine, ranks=2 * case.machine.ranks))
            if case.choose():
                return case
        return None


def _gib(estimate: Estimate) -> str:
    return f"{estimate.total / 2**30:.0f} GiB"
