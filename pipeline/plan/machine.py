"""What a plan assumes of machines. Peak rates and memory are those of the makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from otpo.errors import UserError

GB, GIB = 10**9, 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        memory: bytes that the driver reports as usable.
        flops: peak bf16 multiply-adds and adds a second, dense, accumulated in float32.
        fp32: the same in float32, which training computes in full.
        bandwidth: bytes a second between memory and cores.
        links: bytes a second to other GPUs of the node, one way; half of it is assumed to be reached.
    """

    name: str
    memory: int
    flops: float
    fp32: float
    bandwidth: float
    links: float

    def peak(self, dtype_bytes: int) -> float:
        """Operations a second in the precision of a computation: numbers of 4 bytes, or of 2."""
        return self.fp32 if dtype_bytes == 4 else self.flops


GPUS = {
    gpu.name: gpu
    for gpu in (
        # https://www.nvidia.com/en-us/data-center/b200, .../h200, .../h100, .../a100, .../l40s, .../l4, .../a10
        Gpu("B200", 179 * GIB, 2.25e15, 75e12, 8e12, 900e9),
        Gpu("H200", 140 * GIB, 989e12, 67e12, 4.8e12, 450e9),
        Gpu("H100", 79 * GIB, 989e12, 67e12, 3.35e12, 450e9),
        Gpu("A100", 79 * GIB, 312e12, 19.5e12, 2.0e12, 300e9),
        Gpu("A100-40G", 39 * GIB, 312e12, 19.5e12, 1.55e12, 300e9),
        Gpu("L40S", 44 * GIB, 362e12, 91.6e12, 0.86e12, 32e9),
        Gpu("L4", 22 * GIB, 121e12, 30.3e12, 0.3e12, 16e9),
        Gpu("A10G", 22 * GIB, 70e12, 31.2e12, 0.6e12, 16e9),
    )
}

UTILISATION = 0.40  # of the data sheet's speed that a step is assumed to reach (docs/benchmarks.md: one H100, one H200)


@dataclass(frozen=True)
class Machine:
    """Where training happens: nodes of GPUs, or CPUs that share a node's memory.

    Attributes:
        gpu: None on CPUs.
        ranks: training workers.
        per_node: workers on one node.
        memory: bytes of a GPU, or of a CPU node; None where nobody knows.
        network: bytes a second between nodes for each GPU, one way: 400 Gb/s, as nodes of eight H100s have.
        disk: bytes a second that each node writes to shared storage.
        utilisation: share of `gpu.flops` that a step reaches while it computes.
        usd_per_gpu_hour: price, if one was given.
    """

    gpu: Gpu | None
    ranks: int
    per_node: int
    memory: int | None
    network: float = 50e9
    disk: float = 1e9
    utilisation: float = UTILISATION
    usd_per_gpu_hour: float | None = None

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return -(-self.ranks // self.per_node)

    def __str__(self) -> str:
        kind = self.gpu.name if self.gpu else "CPU worker"
        if self.nodes > 1:
            return f"{self.nodes} nodes of {self.per_node} {kind}{'s' if self.per_node > 1 else ''}"
        return f"{self.ranks} {kind}{'s' if self.ranks > 1 else ''}"


def known_gpu(name: str, memory: int) -> Gpu | None:
    """The kind of a GPU that is at hand; None where its kind is not known here.

    Args:
        name: as the driver gives it, such as "NVIDIA A100-SXM4-40GB".
        memory: bytes that it has. Kinds of one name differ in it, and a slice of a GPU has less.
    """
    words = re.split(r"[^A-Z0-9]+", name.upper())
    alike = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in words]
    held = [gpu for gpu in alike if gpu.memory <= memory]
    if held:
        return max(held, key=lambda gpu: gpu.memory)
    return min((replace(gpu, memory=memory) for gpu in alike), key=lambda gpu: gpu.bandwidth, default=None)


def gpu_machine(
    name: str, *, nodes: int, per_node: int, utilisation: float = UTILISATION, usd: float | None = None
) -> Machine:
    """Nodes of GPUs of a known kind.

    Raises:
        UserError: the kind is not known here.
    """
    found = {known.lower(): gpu for known, gpu in GPUS.items()}.get(name.lower())
    if found is None:
        raise UserError(f"--gpu: expected one of {', '.join(GPUS)}, found '{name}'.")
    for option, count in (("--nodes", nodes), ("--gpus-per-node", per_node)):
        if count < 1:
            raise UserError(f"{option} must be at least 1, found {count}")
    return Machine(found, nodes * per_node, per_node, found.memory, utilisation=utilisation, usd_per_gpu_hour=usd)
