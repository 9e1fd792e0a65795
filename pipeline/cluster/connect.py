"""Connecting to Ray, and what it has."""

from __future__ import annotations

import logging
import os

import ray

from otpo.errors import UserError, WorkError


def connect(address: str | None = None) -> None:
    """Join the cluster at `address` (or RAY_ADDRESS), else start one on this machine that ends with this process.

    Does nothing when this process is connected already.

    Raises:
        UserError: nothing answers at the address.
    """
    if ray.is_initialized():
        return
    # worker output goes to Ray's own log files; what matters comes back as metrics and errors
    try:
        ray.init(
            address=address or os.environ.get("RAY_ADDRESS") or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except ConnectionError as error:
        raise UserError(
            f"No Ray cluster answers at '{address}': {error}. Start one with `ray start --head`, or leave"
            " cluster.address out."
        ) from error
    except Exception as error:  # Ray raises no narrower one when a node is too slow to start
        if "timed out" not in str(error):
            raise
        raise WorkError(
            f"Ray did not start in time: {error}. Is the machine very busy? The same command tries again."
        ) from error
    for name in ("ray", "ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)


def node_pool(name: str) -> dict[str, float]:
    """What a worker asks of the nodes set apart for its kind, "train" or "generate" (cluster.yaml); nothing where no
    node is.
    """
    return {name: 1.0} if ray.cluster_resources().get(name) else {}


def check_workers(workers: int, *, use_gpu: bool | str) -> bool:
    """Whether the training workers take GPUs; they must fit into the cluster as it is now.

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


def training_nodes() -> list[dict[str, float]]:
    """Resources of the nodes that training workers may be placed on."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [node for node in nodes if node.get("train")] if node_pool("train") else nodes


def cpus_per_worker(workers: int, cpus: list[int]) -> int:
    """CPUs that each of `workers` can take, given the nodes' CPUs: a worker's stand on one node."""
    shares = range(max(cpus, default=1), 0, -1)
    return next((share for share in shares if sum(n // share for n in cpus) >= workers), 1)
