"""Training that is killed: workers, the driver, Ctrl-C. What comes out is what an undisturbed run gives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import yaml
from support.training import losses, metrics, settings
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

STEPS = 40
GONE_SECONDS = 15
# Ray's two agents of a killed node first try to tell its dead control store, for 60 s: a number fixed in their code.
AGENTS_GONE_SECONDS = 90


class Driver:
    """`otpo train` in a process group of its own, as a terminal starts it, and every process that comes of it."""

    def __init__(self, folder: Path):
        self.log = folder / "stderr.txt"
        self.label = folder / "runs" / "small" / "models" / "otpo"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", "train", "recipe.yaml"],
                cwd=folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"},
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

    def left_behind(self, seconds: float = GONE_SECONDS) -> list[psutil.Process]:
        """Processes of the family that outlive the driver by more than that."""
        return psutil.wait_procs(self.family, timeout=seconds)[1]

    def workers(self) -> list[psutil.Process]:
        found = []
        for process in self.look():
            with suppress(psutil.NoSuchProcess):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
        return found


@contextmanager
def driving(folder: Path) -> Iterator[Driver]:
    """A driver; whatever is left of it at the end is ended."""
    driver = Driver(folder)
    try:
        yield driver
    finally:
        for process in [psutil.Process(driver.process.pid)] if driver.process.poll() is None else []:
            process.kill()
        driver.process.wait()
        for process in driver.family:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def prepare(folder: Path, start: Path) -> Path:
    train = {"max_steps": STEPS, "save_every": 5, "eval_every": 5, "max_failures": 2}
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings(folder, start, methods={"otpo": {}}, train=train)))
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_llama) -> Path:
    folder = prepare(tmp_path_factory.mktemp("undisturbed"), tiny_llama)
    with driving(folder) as driver:
        assert driver.wait() == 0, driver.log.read_text()
        assert len(driver.family) > 5 and not driver.left_behind()
    return driver.label


def same_run(label: Path, undisturbed: Path) -> None:
    assert losses(label) == pytest.approx(losses(undisturbed), abs=1e-6)
    for ours, theirs in zip(metrics(label)[1], metrics(undisturbed)[1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    first, second = (AutoModelForCausalLM.from_pretrained(p / "model").state_dict() for p in (label, undisturbed))
    assert all((first[name] - second[name]).abs().max() < 1e-5 for name in second)


def test_a_killed_worker(tmp_path, tiny_llama, undisturbed):
    """Ray Train starts the group again, and the job goes on from its newest complete checkpoint."""
    with driving(prepare(tmp_path, tiny_llama)) as driver:
        driver.wait_for(lambda: driver.steps() >= 12)
        workers = driver.workers()
        assert len(workers) == 2
        workers[1].kill()
        driver.wait_for(lambda: driver.steps() < STEPS and len(set(driver.workers()) - set(workers)) == 2)
        assert driver.wait() == 0, driver.log.read_text()
        assert not driver.left_behind()
    same_run(driver.label, undisturbed)
    assert "Traceback" not in driver.log.read_text()


def test_a_killed_driver(tmp_path, tiny_llama, undisturbed):
    """Nothing outlives it, and the same command goes on."""
    folder = prepare(tmp_path, tiny_llama)
    with driving(folder) as driver:
        driver.wait_for(lambda: driver.steps() >= 17)
        driver.process.kill()
        driver.process.wait()
        names = [process.name() for process in driver.left_behind()]
        assert all("Agent" in name for name in names), names
        assert not driver.left_behind(AGENTS_GONE_SECONDS)
    done = driver.steps()
    assert 17 <= done < STEPS and not (driver.label / "model").exists()
    with driving(folder) as driver:
        assert driver.wait() == 0, driver.log.read_text()
        assert not driver.left_behind()
    same_run(driver.label, undisturbed)


def test_ctrl_c(tmp_path, tiny_llama, undisturbed):
    """It ends within seconds, says that nothing is lost, and leaves nothing running."""
    folder = prepare(tmp_path, tiny_llama)
    with driving(folder) as driver:
        driver.wait_for(lambda: driver.steps() >= 7)
        driver.look()
        os.killpg(driver.process.pid, signal.SIGINT)
        started = time.monotonic()
        code = driver.wait(60)
        seconds, said = time.monotonic() - started, driver.log.read_text()
        assert code == 1 and "the same command goes on from there" in said, said
        assert "Traceback" not in said and len(said.splitlines()) < 20, said
        assert seconds < 20
        assert not driver.left_behind()
    with driving(folder) as driver:
        assert driver.wait() == 0, driver.log.read_text()
    same_run(driver.label, undisturbed)


def test_a_failure_that_comes_again_at_the_same_step_is_tried_twice(tmp_path, tiny_llama):
    """Not `max_failures` times more: where checkpoints should go there is a file."""
    folder = prepare(tmp_path, tiny_llama)
    blocked = folder / "runs" / "small" / "models" / "otpo" / "checkpoints"
    blocked.parent.mkdir(parents=True)
    blocked.touch()
    with driving(folder) as driver:
        assert driver.wait() == 1
        said = driver.log.read_text()
        assert "The same failure came twice" in said and "checkpoints" in said and "Traceback" not in said, said
        assert "failed 3 times" not in said
