"""Where CPUs and GPUs are placed: what training workers, engines and the trials of a sweep ask of the cluster.

Importing this module starts nothing; its functions need a connection (`pipeline.cluster.connect`), except those that
are told what the cluster has.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import ray

from otpo.errors import UserError


def has_gpu() -> bool:
    """Whether any node has a GPU."""
    return ray.cluster_resources().get("GPU", 0) > 0


def node_pool(name: str) -> dict[str, float]:
    """What a worker asks of the nodes set apart for its kind, "train" or "generate" (cluster.yaml).

    Nothing where no node is set apart.
    """
    return {name: 1.0} if ray.cluster_resources().get(name) else {}


# ---- training workers ----


def training_nodes() -> list[dict[str, float]]:
    """Resources of the nodes that training workers may be placed on."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [node for node in nodes if node.get("train")] if node_pool("train") else nodes


def check_workers(workers: int, *, use_gpu: bool | str) -> bool:
    """Whether training workers take GPUs; they must fit into the cluster as it is now.

    Args:
        use_gpu: True, False, or "auto" (GPUs if there are enough of them).

    Raises:
        UserError: more workers than the cluster has CPUs or GPUs for training.
    """
    nodes = training_nodes()
    gpus, cpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("GPU", "CPU"))
    on_gpu = gpus >= workers if use_gpu == "auto" else bool(use_gpu)
    kind, available = ("GPU", gpus) if on_gpu else ("CPU", cpus)
    if workers > available:
        raise UserError(
            f"train.workers is {workers}, but the cluster has {available} {kind}{'s' if available != 1 else ''}"
            f"{' for training' if node_pool('train') else ''}. Set train.workers={max(1, available)}, or add nodes."
        )
    return on_gpu


def cpus_per_worker(workers: int, cpus: list[int]) -> int:
    """CPUs that each of `workers` can have. All CPUs of one worker are on one node.

    Args:
        cpus: of each node.
    """
    sizes = range(max(cpus, default=1), 0, -1)
    return next((size for size in sizes if sum(n // size for n in cpus) >= workers), 1)


# ---- engines ----


def engine_resources(workers: int, gpus: int) -> dict[str, Any]:
    """Options of the Ray actors that hold engines.

    Args:
        workers: engines. gpus: GPUs of each.

    Raises:
        UserError: the cluster has too few GPUs.
    """
    available = ray.cluster_resources().get("GPU", 0)
    if gpus * workers > available:
        raise UserError(
            f"generation wants {workers} workers with {gpus} GPUs each, and the cluster has {available:g}: "
            "lower generate.workers or generate.tensor_parallel_size."
        )
    options: dict[str, Any] = {"num_cpus": 0, "num_gpus": gpus, "resources": node_pool("generate")}
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
        keep_engine: whether the engine stays loaded while trials train.
    """

    concurrent: int
    cpus: int
    keep_engine: bool


def allocate_trials(
    *, trials: int, workers: int, engine_gpus: int, gpus: int, cpus: list[int], on_gpu: bool
) -> Allocation:
    """As many trials at a time as have room: Ray Tune reserves nothing for a trial, so more would block each other.

    Args:
        trials: most trials at a time.
        workers: training workers of a trial.
        engine_gpus: that generation takes beside the trials.
        gpus: of the cluster.
        cpus: of each of its nodes.
        on_gpu: whether training takes GPUs, one a worker.
    """
    # where training and the engine do not fit side by side, they take turns
    keep_engine = not on_gpu or gpus - engine_gpus >= workers
    room = sum(cpus) // workers if not on_gpu else (gpus - engine_gpus) // workers if keep_engine else 1
    concurrent = max(1, min(trials, room))
    return Allocation(concurrent, cpus_per_worker(concurrent * workers, cpus), keep_engine)
