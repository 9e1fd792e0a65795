"""Where CPUs and GPUs are placed: what training workers, engines and the trials of a sweep ask of the cluster.

Nodes may be set apart by a custom resource, one unit a GPU: `train` for training, `generate` for engines, as
cluster.yaml has it. Only nodes that are there count: Ray tells nobody how far an autoscaler may go. Importing this
module starts nothing. `live_nodes` and what reads it need a connection (`pipeline.cluster.connect`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

from otpo.errors import UserError

Node = dict[str, float]
"""What a node offers: Ray's resource -> amount."""

ACCELERATOR = "accelerator_type:"  # Ray's resource of a node with a GPU of a known kind
NO_BF16 = {"K80", "P4", "P100", "V100", "T4"}  # GPUs of a compute capability below 8.0, as Ray names them
SERVED_SIZE = "judge.vllm.tensor_parallel_size"  # with data_parallel_size, the GPUs of a judge that vLLM serves
NODE_GROUP = "ray.io/node-group"  # Ray's label of nodes that an autoscaler started, or may start


def live_nodes() -> list[Node]:
    """The nodes that are there."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def grows() -> bool:
    """Whether an autoscaler may add nodes."""
    return any(node["Labels"].get(NODE_GROUP) for node in ray.nodes() if node["Alive"])


def has_gpu() -> bool:
    """Whether Ray is connected, and any node has a GPU."""
    return ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0


def any_gpu(nodes: Sequence[Node]) -> bool:
    """Whether any of the nodes has a GPU."""
    return any(node.get("GPU") for node in nodes)


def set_apart(pool: str, nodes: Sequence[Node]) -> list[Node]:
    """The nodes that are set apart for a kind of work, "train" or "generate"; often none."""
    return [node for node in nodes if node.get(pool)]


def _count(node: Node, kind: str) -> int:
    return int(node.get(kind, 0))


# ---- training workers ----


@dataclass(frozen=True)
class TrainingRoom:
    """What training workers find on the nodes that they may be placed on.

    Attributes:
        nodes: those set apart for training, else all.
        pool: whether they are set apart.
    """

    nodes: tuple[Node, ...]
    pool: bool

    @classmethod
    def of(cls, nodes: Sequence[Node]) -> TrainingRoom:
        """The room that a cluster's nodes make."""
        apart = set_apart("train", nodes)
        return cls(tuple(apart or nodes), bool(apart))

    def slots(self, node: Node, *, gpu: bool, cpus: int = 1) -> int:
        """Workers that a node holds, with one GPU or none and with `cpus` CPUs each."""
        counts = [_count(node, "CPU") // cpus]
        counts += [_count(node, "GPU")] if gpu else []
        counts += [_count(node, "train")] if self.pool else []
        return min(counts)

    def workers(self, *, gpu: bool) -> int:
        """Workers that all nodes hold."""
        return sum(self.slots(node, gpu=gpu) for node in self.nodes)

    @property
    def gpus(self) -> int:
        """GPUs that training may take."""
        return sum(_count(node, "GPU") for node in self.nodes)

    def cpus_per_worker(self, workers: int, *, gpu: bool) -> int:
        """CPUs that each of `workers` can have. All CPUs of one worker are on one node.

        With GPUs, at most a node's CPUs for each of its GPUs: more would leave a GPU without CPUs, and the next worker
        of a larger group without a place.
        """
        shares = [
            _count(node, "CPU") // max(_count(node, "GPU"), 1) if gpu else _count(node, "CPU") for node in self.nodes
        ]
        sizes = range(max(shares, default=1), 0, -1)
        fits = (size for size in sizes if sum(self.slots(n, gpu=gpu, cpus=size) for n in self.nodes) >= workers)
        return next(fits, 1)

    def check(self, workers: int, *, use_gpu: bool | str) -> bool:
        """Whether training workers take GPUs; they must fit into the nodes.

        Args:
            use_gpu: True, False, or "auto" (GPUs if there are enough of them).

        Raises:
            UserError: more workers than the nodes have CPUs or GPUs for training.
        """
        on_gpu = self.workers(gpu=True) >= workers if use_gpu == "auto" else bool(use_gpu)
        room = self.workers(gpu=on_gpu)
        apart = " for training" if self.pool else ""
        if on_gpu and not self.gpus:
            raise UserError(
                f"train.use_gpu is true, but there is no GPU{apart}. Set train.use_gpu=auto or false to train on CPUs,"
                " or cluster.address to a cluster with GPUs; `otpo doctor` says why a GPU of this machine is not seen."
            )
        if workers > room:
            way = f"Set train.workers={room}, or" if room else "Give these nodes what is missing, or"
            raise UserError(
                f"train.workers is {workers}, but the cluster has {self._found(room, gpu=on_gpu)}. {way} add nodes:"
                " training starts only with its nodes at hand, so raise the least number of nodes of an autoscaled"
                " pool."
            )
        return on_gpu

    def _found(self, room: int, *, gpu: bool) -> str:
        """What there is for workers, and of what too little: `room` workers find a place."""
        amounts = {kind: sum(_count(node, kind) for node in self.nodes) for kind in ("GPU", "CPU", "train")}
        kind = "GPU" if gpu else "CPU"
        held = f"{amounts[kind]} {kind}{'s' if amounts[kind] != 1 else ''}{' for training' if self.pool else ''}"
        if amounts[kind] == room:
            return held
        needs = [f"a CPU (there are {amounts['CPU']})"] if gpu else []
        needs += [f"a unit of the resource `train` (there are {amounts['train']})"] if self.pool else []
        return f"{held} with room for {room}: on its node each worker takes {' and '.join(needs)} too"

    def why_on_cpu(self, workers: int, *, use_gpu: bool | str) -> str | None:
        """A sentence where `auto` leaves GPUs idle, because they are fewer than the workers."""
        gpus = self.workers(gpu=True)
        if use_gpu != "auto" or not 0 < gpus < workers:
            return None
        return (
            f"on the CPU, because train.workers is {workers} and there {'is' if gpus == 1 else 'are'} {gpus}"
            f" GPU{'s' if gpus > 1 else ''} for training: set train.workers={gpus} to train on the GPU"
        )


def training_room() -> TrainingRoom:
    """The room for training in the cluster as it is now."""
    return TrainingRoom.of(live_nodes())


# ---- engines ----


def engine_demands(workers: int, gpus: int, nodes: Sequence[Node], *, on_training_nodes: bool = True) -> list[Node]:
    """What each engine that fits the nodes asks for beside its GPUs, the pool's own nodes first.

    Engines need all their GPUs on one node.

    Args:
        workers: engines. gpus: GPUs of each.
        on_training_nodes: whether they may also take nodes that are set apart for training, which idle meanwhile.

    Returns:
        One dictionary of custom resources for each engine, at most `workers` of them.
    """
    own = set_apart("generate", nodes)
    if not own:
        free = sum(_count(node, "GPU") // gpus for node in nodes) if gpus else workers
        return [{}] * min(workers, free)
    found: list[Node] = []
    for pool in ("generate", "train") if on_training_nodes else ("generate",):
        for node in set_apart(pool, nodes):
            units = _count(node, pool) // max(gpus, 1)
            found += [{pool: float(max(gpus, 1))}] * (min(units, _count(node, "GPU") // gpus) if gpus else units)
    return found[:workers]


def check_engines(
    workers: int,
    gpus: int,
    nodes: Sequence[Node],
    *,
    on_training_nodes: bool = True,
    key: str = "generate.tensor_parallel_size",
) -> list[Node]:
    """`engine_demands` of engines, of which at least one must fit the nodes.

    Args:
        key: of the recipe, which says how many GPUs an engine takes.

    Raises:
        UserError: none does.
    """
    found = engine_demands(workers, gpus, nodes, on_training_nodes=on_training_nodes)
    if not found:
        raise UserError(
            f"{key} makes engines of {gpus} GPU{'s' if gpus != 1 else ''} each, and no node has room for one: an engine"
            f" stays within a node, and {_largest(gpus, nodes, on_training_nodes=on_training_nodes)}. Lower {key}, or"
            " add nodes; of an autoscaled pool at least one node must be there."
        )
    return found


def _largest(gpus: int, nodes: Sequence[Node], *, on_training_nodes: bool) -> str:
    """Why the largest node that engines may take has no room for one."""
    apart = set_apart("generate", nodes)
    taken = [*apart, *(set_apart("train", nodes) if on_training_nodes else [])] if apart else list(nodes)
    largest = max(taken, key=lambda node: _count(node, "GPU"), default={})
    found = _count(largest, "GPU")
    said = f"the largest node {'of those for engines ' if len(taken) < len(nodes) else ''}has {found}"
    if not apart or found < gpus:
        return said
    pool = "generate" if largest.get("generate") else "train"
    return (
        f"{said}, with {_count(largest, pool)} of the resource `{pool}`, of which an engine takes one for each GPU:"
        " start the node with as many"
    )


def beside_judge(gpus: int, nodes: Sequence[Node]) -> list[Node]:
    """What the nodes offer to others while vLLM serves a judge on one of them, for as long as models are trained.

    Args:
        gpus: that the judge holds; 0 where it has none.

    Raises:
        UserError: no node has room for it.
    """
    if not gpus:
        return list(nodes)
    (demand,) = check_engines(1, gpus, nodes, on_training_nodes=False, key=SERVED_SIZE)
    held = {"GPU": gpus, **demand}
    roomy = [node for node in nodes if all(_count(node, kind) >= held[kind] for kind in held)]
    taken = min(roomy, key=lambda node: _count(node, "GPU"))
    held["CPU"] = (
        _count(taken, "CPU") // _count(taken, "GPU") * gpus
    )  # its processes want them, though Ray does not know
    return [{kind: node[kind] - held.get(kind, 0) for kind in node} if node is taken else node for node in nodes]


def check_precision(dtype: str, nodes: Sequence[Node]) -> None:
    """Refuse engines of vLLM in bf16 where they may be placed on GPUs that do not compute in it.

    Args:
        dtype: "auto" is bf16 on GPUs.

    Raises:
        UserError: there are such GPUs.
    """
    apart = [*set_apart("generate", nodes), *set_apart("train", nodes)] if set_apart("generate", nodes) else nodes
    kinds = {name.removeprefix(ACCELERATOR) for node in apart for name in node if name.startswith(ACCELERATOR)}
    if dtype != "fp32" and (old := sorted(kinds & NO_BF16)):
        raise UserError(
            f"generation computes in bf16 on GPUs (generate.dtype={dtype}), and vLLM has no bf16 on {', '.join(old)}."
            " Set generate.dtype=fp32 or generate.backend=transformers, or give engines nodes of newer GPUs, with the"
            " resource `generate`."
        )


def fewer_engines(wanted: int, found: int, *, waiting: bool) -> str | None:
    """A sentence where fewer engines than wanted fit the nodes."""
    if found >= wanted:
        return None
    rest = "the others wait for nodes to come" if waiting else "the others are not started"
    return f"{found} of {wanted} engines (generate.workers) fit the nodes that are there; {rest}"


def actor_options(gpus: int, demand: Node) -> dict[str, Any]:
    """Options of a Ray actor that holds a model: an engine, or a reward model."""
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": gpus, "resources": demand}
    return options if gpus else options | {"scheduling_strategy": "SPREAD"}


def engine_threads(workers: int) -> int:
    """CPU threads of each of `workers` engines, which share the nodes' cores evenly."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // math.ceil(workers / nodes))


# ---- trials of a sweep ----


@dataclass(frozen=True)
class Allocation:
    """How the cluster is divided among a sweep's trials.

    Attributes:
        concurrent: trials at a time.
        cpus: of each training worker.
        keep_engine: whether the engines stay loaded while trials train.
    """

    concurrent: int
    cpus: int
    keep_engine: bool


def allocate_trials(
    nodes: Sequence[Node], *, trials: int, workers: int, engines: int, engine_gpus: int, on_gpu: bool
) -> Allocation:
    """As many trials at a time as have room: Ray Tune reserves nothing for a trial, so more would block each other.

    Args:
        nodes: of the cluster.
        trials: most trials at a time.
        workers: training workers of a trial.
        engines: that generate beside the trials; 0 where nothing is generated.
        engine_gpus: of each engine.
        on_gpu: whether training takes GPUs, one a worker.
    """
    room = TrainingRoom.of(nodes)
    beside = engine_demands(engines, engine_gpus, nodes, on_training_nodes=False)
    # engines on nodes of their own take nothing from training; where both share nodes they may have to take turns
    shared = 0 if set_apart("generate", nodes) else engine_gpus * len(beside)
    slots = room.workers(gpu=on_gpu) - (shared if on_gpu else 0)
    keep_engine = not on_gpu or not engines or (bool(beside) and slots >= workers)
    concurrent = max(1, min(trials, slots // workers)) if keep_engine else 1
    return Allocation(concurrent, room.cpus_per_worker(concurrent * workers, gpu=on_gpu), keep_engine)
