"""The command in a process of its own: what its refusals have in common, and training to be killed in part or whole."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from transformers import AutoModelForCausalLM

from support.training import losses, metrics, settings

WATCH = """
import atexit, json, sys
from jobs.cli import main
atexit.register(lambda: open(sys.argv[0], "w").write(json.dumps([m for m in ("ray", "torch") if m in sys.modules])))
main()
"""


@dataclass
class Done:
    code: int
    out: str
    err: str
    loaded: list[str]
    started_ray: bool
    seconds: float


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def otpo(folder: Path, *arguments: Any, **environment: str) -> Done:
    """The command in a process of its own, in `folder`."""
    watched = folder / "loaded.json"
    command = [sys.executable, "-c", f"import sys; sys.argv[0] = {str(watched)!r}\n{WATCH}", *map(str, arguments)]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as short:  # a socket's path has 107 bytes at most
        rays = Path(short) / "r"  # where Ray would keep its session
        environment = {**os.environ, "RAY_TMPDIR": str(rays), **environment}
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
        loaded, seconds = json.loads(watched.read_text()), time.monotonic() - started
        return Done(done.returncode, done.stdout, done.stderr, loaded, rays.exists(), seconds)


def refused(done: Done, *words: str) -> None:
    """Exit code 2, one message with these words, no traceback, and Ray was not started."""
    assert done.code == 2, done.err
    for word in words:
        assert word in done.err, done.err
    assert "Traceback" not in done.err and len(done.err) < 2000
    assert not done.started_ray


def nothing_begun(folder: Path) -> None:
    """No run has left anything in `folder`."""
    assert not list(folder.glob("runs/*"))


# ---- training to be killed ----

STEPS = 40
GONE_SECONDS = 15
# Ray's two agents of a node first try for 60 s (a number fixed in their code) to tell a control store that is gone:
# after a kill always, after an ordinary end where the machine is busy.
AGENTS_GONE_SECONDS = 90


def _is_agent(process: psutil.Process) -> bool:
    try:
        return "Agent" in process.name()
    except psutil.NoSuchProcess:
        return True


class Driver:
    """`otpo train` in a process group of its own, as a terminal starts it, and every process that comes of it."""

    def __init__(self, folder: Path, **environment: str):
        self.log = folder / "stderr.txt"
        self.label = folder / "runs" / "small" / "models" / "otpo"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", "train", "recipe.yaml"],
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
                | environment,
            )
        self.family: set[psutil.Process] = set()

    def look(self) -> set[psutil.Process]:
        """Remember the processes that are there now."""
        with suppress(psutil.NoSuchProcess):
            self.family |= set(psutil.Process(self.process.pid).children(recursive=True))
        return self.family

    def steps(self) -> int:
        path = self.label / "metrics.jsonl"
        return path.read_text().count('"loss"') if path.exists() else 0

    def wait_for(self, condition: Callable[[], bool], seconds: float = 300) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, f"waited {seconds} s; {self.log.read_text()[-2000:]}"
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.log.read_text()[-2000:]}"
            self.look()
            time.sleep(0.05)

    def wait(self, seconds: float = 400) -> int:
        until = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < until, f"still running; {self.log.read_text()[-2000:]}"
            self.look()
            time.sleep(0.1)
        return self.process.returncode

    def left_behind(self) -> list[psutil.Process]:
        """Processes of the family that outlive the driver by more than GONE_SECONDS; Ray's agents by theirs."""
        left = psutil.wait_procs(self.family, timeout=GONE_SECONDS)[1]
        if all(map(_is_agent, left)):
            left = psutil.wait_procs(left, timeout=AGENTS_GONE_SECONDS - GONE_SECONDS)[1]
        return left

    def workers(self) -> list[psutil.Process]:
        found = []
        for process in self.look():
            with suppress(psutil.NoSuchProcess):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
        return found


@contextmanager
def driving(folder: Path, **environment: str) -> Iterator[Driver]:
    """A driver; whatever is left of it at the end is ended."""
    driver = Driver(folder, **environment)
    try:
        yield driver
    finally:
        for process in [psutil.Process(driver.process.pid)] if driver.process.poll() is None else []:
            process.kill()
        driver.process.wait()
        for process in driver.family:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def workers_recipe(folder: Path, start: Path, **changes: Any) -> Path:
    """A folder with a recipe of OTPO on two workers, which saves every five steps."""
    train = {"max_steps": STEPS, "save_every": 5, "eval_every": 5, "max_failures": 2}
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(settings(folder, start, methods={"otpo": {}}, train=train, **changes))
    )
    return folder


def same_run(label: Path, undisturbed: Path) -> None:
    assert losses(label) == pytest.approx(losses(undisturbed), abs=1e-6)
    for ours, theirs in zip(metrics(label)[1], metrics(undisturbed)[1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    first, second = (AutoModelForCausalLM.from_pretrained(p / "model").state_dict() for p in (label, undisturbed))
    assert all((first[name] - second[name]).abs().max() < 1e-5 for name in second)
