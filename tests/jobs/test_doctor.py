"""`otpo doctor`: what it says here, and what it says of machines with a GPU that lack something."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.doctor import (
    GIB,
    GpuMachine,
    check_gpus,
    check_shared_memory,
    examine,
    import_error,
    nvidia_driver,
)

GOOD = GpuMachine("580.105.08", "13.0", ["NVIDIA H100 80GB HBM3"] * 2, "2.29.7", None)


def test_this_machine() -> None:
    findings = {finding.what: finding for finding in examine()}
    world = "gpu" if nvidia_driver() else "cpu"
    assert findings["versions for this machine"].found == f"constraints-{world}.txt"
    assert {"Python", "torch", "vLLM", "GPUs", "CPUs", "memory", "/dev/shm", "free disk here"} <= findings.keys()
    assert ("NVIDIA driver" in findings) == (world == "gpu")
    assert findings["Python"].ok and findings["torch"].ok and findings["ray"].found == "2.60.0"


def test_a_good_gpu_machine() -> None:
    findings = {finding.what: finding for finding in check_gpus(GOOD)}
    assert all(finding.ok for finding in findings.values())
    said = {what: finding.found for what, finding in findings.items()}
    assert said["NVIDIA driver"] == "580.105.08" and said["CUDA of torch"] == "13.0"
    assert said["NCCL of torch"] == "2.29.7" and said["import of vLLM"] == "works"
    assert said["GPUs"] == "NVIDIA H100 80GB HBM3, NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("change", "what", "mend"),
    [
        ({"driver": "570.86.15", "torch_gpus": []}, "NVIDIA driver", "branch 580 or newer"),
        ({"torch_cuda": None, "nccl": None, "torch_gpus": []}, "GPUs", "make setup"),
        ({"torch_gpus": []}, "GPUs", "CUDA_VISIBLE_DEVICES"),
        ({"vllm_error": "ImportError: libcudart.so.13"}, "import of vLLM", "make setup"),
    ],
)
def test_what_is_wrong_is_named_with_what_mends_it(change: dict, what: str, mend: str) -> None:
    wrong = {finding.what: finding for finding in check_gpus(dataclasses.replace(GOOD, **change)) if not finding.ok}
    assert what in wrong and mend in wrong[what].mend


def test_small_shared_memory_is_wrong_beside_gpus_only() -> None:
    docker = 64 * 2**20
    assert not check_shared_memory(docker, needed=True).ok
    assert check_shared_memory(docker, needed=False).ok and check_shared_memory(16 * GIB, needed=True).ok


def test_the_driver_is_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for script, found in (
        ("echo 580.105.08; echo 580.105.08", "580.105.08"),
        ("echo NVIDIA-SMI has failed because it cannot reach the driver; exit 9", None),
        ("echo No devices were found", None),
    ):
        smi.write_text(f"#!/bin/sh\n{script}\n")
        smi.chmod(0o755)
        assert nvidia_driver() == found


def test_an_import_is_tried_in_a_process_of_its_own() -> None:
    assert import_error("json") is None
    assert import_error("no_such_module") == "ModuleNotFoundError: No module named 'no_such_module'"


def test_the_verb_prints_a_line_each() -> None:
    done = subprocess.run([sys.executable, "-m", "jobs.cli", "doctor"], capture_output=True, text=True, timeout=300)
    assert "versions for this machine: constraints-" in done.stdout and "/dev/shm: " in done.stdout, done.stderr
