"""Nodes that cannot do their part are found before a start: real raylets, one of which sees or runs something else."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.command import free_port

import pipeline

ROOT = Path(pipeline.__file__).resolve().parents[1]
RAY = Path(sys.executable).with_name("ray")
CHECK = """
import sys
from pathlib import Path
from otpo.errors import UserError
from pipeline.cluster.connect import connect
from pipeline.cluster.nodes import check_nodes
connect()
try:
    check_nodes(Path(sys.argv[1]), {"model.path": sys.argv[2]})
except UserError as error:
    print("refused:", error)
else:
    print("all nodes can do their part")
"""


@contextmanager
def started(command: list[str], environment: dict[str, str]) -> Iterator[None]:
    """A raylet in a session of its own, ended whole."""
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert any(b"Ray runtime started" in line for line in process.stdout)
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def cluster(second: list[str]) -> Iterator[dict[str, str]]:
    """A head and one more node that `second` starts; gives the environment of a driver."""
    port, unused = free_port(), free_port()
    with tempfile.TemporaryDirectory() as short:  # a socket's path has 107 bytes at most
        common = os.environ | {"RAY_TMPDIR": short, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
        head = [RAY, "start", "--head", f"--port={port}", "--num-cpus=1", f"--dashboard-port={unused}", "--block"]
        join = f"{RAY} start --address=127.0.0.1:{port} --num-cpus=1 --block"
        with started([str(word) for word in head], common), started([*second, join], common):
            yield common | {"RAY_ADDRESS": f"127.0.0.1:{port}"}


def answer(environment: dict[str, str], folder: Path, model: Path) -> str:
    command = [sys.executable, "-c", CHECK, str(folder), str(model)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=200).stdout


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    for name in ("run", "model"):
        (tmp_path / name).mkdir()
    return tmp_path / "run", tmp_path / "model"


@pytest.fixture
def own_mounts() -> Callable[[str], list[str]]:
    """A shell whose file systems differ from ours by what a command mounts."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make a mount namespace")
    return lambda mount: ["unshare", "-m", "sh", "-c", f'{mount}; eval "$0"']


@pytest.mark.slow
def test_a_node_that_sees_the_same_and_runs_the_same(folders):
    with cluster(["sh", "-c"]) as environment:
        assert "all nodes can do their part" in answer(environment, *folders)
    assert not list(folders[0].iterdir()), "the probe is removed"


@pytest.mark.slow
def test_a_node_whose_code_differs_in_a_line(folders, own_mounts, tmp_path):
    other = tmp_path / "otpo"  # this folder alone: the interpreter may lie in the same checkout
    shutil.copytree(ROOT / "otpo", other, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "errors.py").open("a") as file:
        file.write("# changed\n")
    with cluster(own_mounts(f"mount --bind {other} {ROOT / 'otpo'}")) as environment:
        said = answer(environment, *folders)
        assert "runs other versions: otpo's code" in said and "Install the same everywhere" in said, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "words"), [("run", "does not see what this machine writes"), ("model", "(model.path)")]
)
def test_a_folder_that_a_node_does_not_see(folders, own_mounts, hidden, words):
    """The node is started where an empty file system covers it."""
    run, model = folders[0], folders[1] / "inside"
    model.mkdir()
    cover = f"mount -t tmpfs tmpfs {run if hidden == 'run' else folders[1]}"
    with cluster(own_mounts(cover)) as environment:
        said = answer(environment, run, model)
        assert words in said and str(run if hidden == "run" else model) in said, said
