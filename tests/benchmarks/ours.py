"""Our preference step as training workers run it, in this process: bf16 compute on fp32 weights, a cached reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from otpo.data.collate import collate_pairs
from otpo.data.micro_batches import TOKENS, micro_batches
from otpo.methods.spec import resolve
from otpo.models.adapters import add_adapters
from otpo.models.compiled import compile_layers
from otpo.models.policy import PolicyModel
from otpo.models.sharding import distribute
from otpo.records import SequenceBatch, TokenPair
from otpo.training.objectives.pair import preference_losses
from otpo.training.optimizer import adamw
from otpo.training.step import optimisation_step
from tests.benchmarks.shapes import LORA, Shape
from tests.benchmarks.turns import turns

STEP = "preference step"  # its name in a profile


@contextmanager
def one_worker() -> Iterator[DeviceMesh]:
    """A group of one process, on the GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh(device, (1,))
    finally:
        dist.destroy_process_group()


def steps_of(shape: Shape, steps: int) -> list[list[SequenceBatch]]:
    """The micro-batches of each step, as a worker makes them; an EOS stands behind each completion of the shape."""
    pairs = shape.step_pairs
    items = [TokenPair(i, p, [*c, 1], [*r, 1]) for i, (p, c, r) in enumerate(shape.pairs(pairs * steps))]
    on_gpu = torch.cuda.is_available()
    size, budget = (None, TOKENS["cuda"]) if on_gpu else (pairs, TOKENS["cpu"])

    def micro(members: list[TokenPair]) -> list[SequenceBatch]:
        groups = micro_batches([item.tokens for item in members], size=size, budget=budget, rank=0, world=1)
        return [collate_pairs([members[i] for i in group]) for group in groups]

    return [micro(items[start : start + pairs]) for start in range(0, len(items), pairs)]


class Ours:
    """A policy, its optimizer and the loss of a method.

    Args:
        work: from `steps_of`. The reference's log-probabilities are computed here, as a run caches them first.
        compiled: None compiles on a GPU, as `train.torch_compile: auto` does.
    """

    def __init__(
        self,
        shape: Shape,
        mesh: DeviceMesh,
        work: Sequence[Sequence[SequenceBatch]],
        method: str = "dpo",
        *,
        padded: bool = False,
        compiled: bool | None = None,
    ):
        self.device = mesh.device_type
        lm = shape.model(self.device)
        policy = PolicyModel(add_adapters(lm, LORA, seed=0) if shape.lora else lm)
        if padded:
            policy.lm.set_attn_implementation("sdpa")
            policy.backbone.shares_prompts = False
        self.model = distribute(
            policy.train(shape.checkpointing),
            mesh,
            dtype=torch.bfloat16,
            activation_checkpointing=shape.checkpointing,
        )
        if compiled or (compiled is None and self.device == "cuda"):
            compile_layers(self.model)
        self.optimizer = adamw(self.model, lr=1e-5, weight_decay=0.0, name=shape.optimizer)
        self.work = [[batch.to(self.device) for batch in batches] for batches in work]
        with torch.no_grad():
            cached = {id(batch): self.model(batch)[0] for batches in self.work for batch in batches}
        spec = resolve(method, {})
        reference = None
        if "reference_kl" in spec.method.needs:
            frozen = distribute(PolicyModel(shape.model(self.device)), mesh, dtype=torch.bfloat16, keep_head=True)
            reference = frozen.requires_grad_(False).eval()
        self.losses = preference_losses(
            self.model, spec, lambda batch: {"reference": cached[id(batch)]}, seed=0, reference=reference
        )

    def step(self, number: int) -> float:
        """Take one step; the seconds that it took."""
        batches = self.work[number]
        pairs = sum(len(batch.rows) // 2 for batch in batches)
        began = _now(self.device)
        with torch.profiler.record_function(STEP):
            optimisation_step(
                self.model, self.optimizer, batches, self.losses, denominator=pairs, max_grad_norm=1.0, lr=1e-5
            )
        return _now(self.device) - began


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(sides: Mapping[str, Callable[[int], float]], steps: int) -> dict[str, list[float]]:
    """Seconds of every side's steps, taken in turns.

    Args:
        sides: name -> a function that takes the step of a number and gives its seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for name, numbers in turns(list(sides), steps):
        seconds[name] += [sides[name](number) for number in numbers]
    return seconds
