"""The kind of a cluster's GPUs. Ray names an A100 of 40 GB as one of 80 GB, so their nodes are asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.cluster.hardware import smallest_gpu

SCRIPT = """
import sys
from pathlib import Path
import ray
ray.init(num_cpus=2, num_gpus=2, resources={"accelerator_type:A100": 1}, include_dashboard=False, log_to_driver=False)
from pipeline.cluster.hardware import cluster_machine
for mib in ("40960", "81920", ""):
    Path(sys.argv[1]).write_text(mib)
    found = cluster_machine(2, gpu=True)
    print(mib, found.gpu.name, found.memory / 2**30)
"""


def driver(folder: Path, command: str) -> str:
    """A program named nvidia-smi that is a shell command, and a PATH on which it is found."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{command}\n")
    program.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("said", "mib"), [("40960\\n40960\\n", 40960), ("81920\\n20480\\n", 20480), ("", None), ("[N/A]\\n", None)]
)
def test_a_node_knows_its_smallest_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, mib) -> None:
    monkeypatch.setenv("PATH", driver(tmp_path, f"printf '{said}'"))
    assert smallest_gpu() == (mib and mib * 2**20)


def test_a_node_without_a_driver_knows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert smallest_gpu() is None


@pytest.mark.slow
def test_the_memory_of_an_a100_is_asked_for(tmp_path: Path) -> None:
    """Where no node knows it, the smaller one is assumed."""
    environment = os.environ | {"PATH": driver(tmp_path, f"cat {tmp_path}/mib")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "mib"], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == "40960 A100-40G 39.0 81920 A100 79.0 A100-40G 39.0".split(), done.stderr
