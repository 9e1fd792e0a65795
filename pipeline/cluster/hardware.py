"""The cluster as a plan sees it: kind and number of GPUs, or the memory of its CPU nodes."""

from __future__ import annotations

from pipeline.cluster.placement import training_room
from pipeline.plan.machine import GPUS, Gpu, Machine

ACCELERATOR = "accelerator_type:"  # Ray's resource of a node with a GPU of a known kind


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
    names = [name.removeprefix(ACCELERATOR) for name in resources if name.startswith(ACCELERATOR)]
    return next((GPUS[name] for name in names if name in GPUS), None)
