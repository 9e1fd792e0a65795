"""The cluster as a plan sees it: kind and number of GPUs, or the memory of its CPU nodes."""

from __future__ import annotations

import subprocess

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.cluster.placement import ACCELERATOR, training_room
from pipeline.plan.machine import GPUS, Gpu, Machine, known_gpu

SECONDS = 60.0  # for nodes to say how much memory their GPUs have


def cluster_machine(workers: int, *, gpu: bool) -> Machine | None:
    """The machine that training workers are placed on; None where Ray does not tell enough."""
    room = training_room()
    if gpu:
        kind = _kind([name for node in room.nodes for name in node])
        per_node = max((room.slots(node, gpu=True) for node in room.nodes), default=0)
        return None if kind is None or not per_node else Machine(kind, workers, min(workers, per_node), kind.memory)
    if len(room.nodes) != 1:
        return None  # how Ray divides the workers among nodes is known only once they are placed
    memory = sum(room.nodes[0].get(name, 0) for name in ("memory", "object_store_memory"))
    return Machine(None, workers, workers, int(memory) or None)


def _kind(resources: list[str]) -> Gpu | None:
    """The kind of the GPUs, of several kinds the one with least memory; None where one is not known here."""
    names = {name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR)}
    kinds = [_of_name(name) for name in sorted(names)]
    known = [kind for kind in kinds if kind is not None]
    return min(known, key=lambda gpu: gpu.memory) if known and len(known) == len(kinds) else None


def _of_name(name: str) -> Gpu | None:
    """The kind that Ray names so. An A100 of 40 GB and one of 80 GB have one name, so their nodes are asked."""
    name = name if name in GPUS else name.split("-")[0]
    alike = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] == name]
    if len(alike) < 2:
        return alike[0] if alike else GPUS.get(name)
    least = min(gpu.memory for gpu in alike)
    return known_gpu(name, _reported_memory(ACCELERATOR + name) or least)


def _reported_memory(resource: str) -> int | None:
    """Bytes of the smallest GPU on the nodes with a resource of this name or longer; None where no node knows."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [node["NodeID"] for node in alive if any(name.startswith(resource) for name in node["Resources"])]
    ask = ray.remote(num_cpus=0, max_retries=0)(smallest_gpu)
    asked = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in nodes
    ]
    done, _ = ray.wait(asked, num_returns=len(asked), timeout=SECONDS)
    found = [memory for memory in ray.get(done) if memory]
    return min(found, default=None)


def smallest_gpu() -> int | None:
    """On a node: bytes of its smallest GPU, as nvidia-smi tells them."""
    words = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=SECONDS / 2).stdout
        return 2**20 * min(int(line) for line in said.splitlines() if line.strip())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
