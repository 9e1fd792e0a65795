"""What a GPU machine gets: its constraints, the image, and the workflow that checks both."""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.pools import ROOT

CPU, GPU = ROOT / "constraints-cpu.txt", ROOT / "constraints-gpu.txt"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
RESOLVER = runpy.run_path(str(ROOT / ".ci" / "resolve_gpu.py"))


def instructions(word: str) -> list[str]:
    """The arguments of every instruction of a kind in the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", DOCKERFILE)
    return [line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith(f"{word} ")]


def lint(dockerfile: Path) -> subprocess.CompletedProcess[str]:
    hadolint = Path(sys.executable).parent / "hadolint"
    return subprocess.run([hadolint, "--no-color", dockerfile], capture_output=True, text=True)


def test_both_worlds_install_the_same_but_for_what_vllm_and_boto3_want() -> None:
    cpu, gpu = (RESOLVER["pins"](path) for path in (CPU, GPU))
    assert {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]} == RESOLVER["APART"]
    assert {"vllm", "torch", "nvidia-nccl-cu13", "triton", "trl", "boto3"} <= gpu.keys()


@pytest.mark.parametrize("path", [CPU, GPU], ids=lambda path: path.name)
def test_a_package_a_line_in_order(path: Path) -> None:
    header, *lines = path.read_text().splitlines()
    assert header.startswith("# ") and lines == sorted(lines, key=RESOLVER["by_name"])
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line) for line in lines)
    assert len({RESOLVER["canonical"](line.split("==")[0]) for line in lines}) == len(lines)


def test_the_dockerfile_is_clean_and_the_linter_bites(tmp_path: Path) -> None:
    assert (found := lint(ROOT / "Dockerfile")).returncode == 0, found.stdout
    (tmp_path / "Dockerfile").write_text("FROM ubuntu:latest\nUSER root\n")
    found = lint(tmp_path / "Dockerfile")
    assert found.returncode and "DL3007" in found.stdout and "DL3002" in found.stdout


def test_the_image_is_one_that_kuberay_can_start() -> None:
    assert not instructions("ENTRYPOINT")  # KubeRay brings the command
    assert instructions("USER") == ["1000"]
    assert any("wget" in run for run in instructions("RUN"))  # for its probes
    assert "PATH=/opt/venv/bin" in instructions("ENV")[0]  # `ray` without a login shell
    order = [DOCKERFILE.index(line) for line in ("pip install", "USER 1000", "RUN otpo doctor")]
    assert order == sorted(order)


def test_the_base_has_the_cuda_of_torch() -> None:
    (base,) = instructions("FROM")
    image, tag = base.split(":")
    assert image == "nvidia/cuda" and tag.endswith("-devel-ubuntu24.04")  # Python 3.12, which the dry run resolves for
    toolkit = RESOLVER["pins"](GPU)["cuda-toolkit"].split("==")[1]
    assert tag.split(".")[:2] == toolkit.split(".")[:2]
    assert RESOLVER["PYTHON"] == "3.12"


def test_the_image_installs_part_of_what_the_dry_run_resolves() -> None:
    (install,) = [run for run in instructions("RUN") if "pip install" in run]
    words = shlex.split(install)
    assert words[words.index("--constraint") + 1] == GPU.name
    extras = {extra for extra in re.fullmatch(r"\.\[(.*)\]", words[-1])[1].split(",")}  # type: ignore[index]
    assert extras <= set(re.fullmatch(r"\.\[(.*)\]", RESOLVER["WHAT"])[1].split(","))  # type: ignore[index]


def test_the_image_holds_no_secret_and_nothing_but_the_package() -> None:
    assert not re.search(r"(?i)token|secret|password|api_key", " ".join(instructions("ENV") + instructions("ARG")))
    first, *kept = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert first == "*"
    names = {line.removeprefix("!") for line in kept if line.startswith("!")}
    assert names == {
        "constraints-gpu.txt",
        "eval",
        "jobs",
        "LICENSE",
        "otpo",
        "pipeline",
        "pyproject.toml",
        "README.md",
    }
    assert all((ROOT / name).exists() for name in names)


def test_make_takes_the_file_of_this_machine(tmp_path: Path) -> None:
    def plan(found: bool) -> str:
        """What `make setup` would do where nvidia-smi finds a GPU, or where it stands without a driver."""
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho something\nexit {0 if found else 9}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        command = ["make", "--dry-run", "--always-make", "setup", "VENV=/nowhere"]
        path = f"{tmp_path}:/usr/bin:/bin"
        return subprocess.run(command, cwd=ROOT, env={"PATH": path}, capture_output=True, text=True, check=True).stdout

    with_gpu, without = plan(True), plan(False)
    assert "--constraint constraints-gpu.txt" in with_gpu and "constraints-cpu.txt" not in with_gpu
    assert "case gpu in" in with_gpu
    assert "--constraint constraints-cpu.txt" in without and "constraints-gpu.txt" not in without


def test_the_workflow_runs_what_a_submission_must_pass() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert {"push", "pull_request"} == set(workflow[True])  # YAML reads `on` as true
    (job,) = workflow["jobs"].values()
    steps = job["steps"]
    assert [step["uses"] for step in steps if "uses" in step] == ["actions/checkout@v7", "actions/setup-python@v7"]
    assert steps[1]["with"]["python-version"] == "3.11" and steps[1]["with"]["cache"] == "pip"
    assert steps[-1] == {"run": "bash .ci/run"}
    assert {"make check", "make check-install", "make test"} <= set((ROOT / ".ci" / "run").read_text().splitlines())
