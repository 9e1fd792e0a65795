"""One writer for a run's folder: two at once are told apart, a killed one is no obstacle, clocks are never compared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.command import otpo, refused
from support.training import losses, settings

from otpo.errors import UserError, WorkError
from pipeline.lock import lock
from pipeline.lock.holder import Holder, machine, start_of
from pipeline.lock.lock import one_writer
from pipeline.recipe import make_recipe
from pipeline.run.run import run

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pathlib import Path
from pipeline.lock.lock import one_writer
with one_writer(Path(sys.argv[1]), HELD_FILE, otherwise="-"):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def holding(folder: Path, *words: str, file: str = "") -> Iterator[subprocess.Popen]:
    """Another process that holds the folder, or a file in it."""
    command = [sys.executable, "-c", HOLD.replace("HELD_FILE", repr(file)), str(folder), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def claims(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.lock"))


def leave_claim(folder: Path, number: int = 1, **changes: object) -> Path:
    """A claim that somebody left, by default a process of another machine."""
    folder.mkdir(exist_ok=True)
    holder = replace(Holder.here(), **({"machine": "elsewhere|boot|pid", "host": "elsewhere"} | changes))
    path = folder / f"writer-{number}.lock"
    path.write_text(holder.text)
    return path


def acquire(folder: Path, **more) -> None:
    with one_writer(folder, otherwise="go elsewhere", **more):
        assert len(claims(folder)) == 1


def test_the_second_is_told_who_writes_and_what_to_do(tmp_path):
    folder = tmp_path / "run"
    with holding(folder, "train", "https://anna:secret@judge.example/v1", "--x") as other:
        with pytest.raises(UserError) as error:
            acquire(folder)
        said = str(error.value)
        for word in (str(folder), f"pid {other.pid}", f"user {Holder.here().user}", "host ", "since 20", "-c",
                     "train https://judge.example/v1 --x", "last sign of life", "s ago", f"kill {other.pid} on ",
                     "go elsewhere"):  # fmt: skip
            assert word in said, said
        assert "secret" not in said and "secret" not in (folder / claims(folder)[0]).read_text()
        other.send_signal(signal.SIGSTOP)  # asleep is not dead
        with pytest.raises(UserError, match="being written"):
            acquire(folder)


def test_a_killed_holder_is_no_obstacle_and_nothing_is_left(tmp_path):
    with holding(tmp_path) as other:
        other.kill()
        time.sleep(0.2)  # not waited for: its parent has not taken note of its end yet
        started = time.monotonic()
        acquire(tmp_path)
        assert time.monotonic() - started < lock.POLL_SECONDS
    acquire(tmp_path)
    assert claims(tmp_path) == []


def test_a_number_that_names_another_process_by_now_is_no_holder(tmp_path):
    parent = os.getppid()
    leave_claim(tmp_path, machine=machine(), pid=parent, started="1")
    acquire(tmp_path)
    leave_claim(tmp_path, machine=machine(), pid=parent, started=start_of(parent))
    with pytest.raises(UserError, match=f"pid {parent}"):
        acquire(tmp_path)


def test_another_machine_that_shows_no_sign_of_life_is_waited_for(tmp_path, monkeypatch):
    """Its PID is a living one here, as that of a container's first process is in every other container."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.05)
    path = leave_claim(tmp_path, pid=os.getpid())
    os.utime(path, (2**32, 2**32))  # its clock says 2106
    told = []
    started = time.monotonic()
    acquire(tmp_path, progress=lambda *call: told.append(call[3]))
    assert 1.0 <= time.monotonic() - started < 10
    assert len(told) == 1 and "sign of life" in told[0] and "host elsewhere" in told[0]


@pytest.mark.parametrize("clock", [0.0, 2.0**32], ids=["1970", "2106"])
def test_another_machine_that_lives_holds_whatever_its_clock_says(tmp_path, monkeypatch, clock):
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.05)
    path, stop = leave_claim(tmp_path), threading.Event()

    def live() -> None:
        now = clock
        while not stop.wait(0.2):
            now += 1
            os.utime(path, (now, now))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        started = time.monotonic()
        with pytest.raises(UserError, match="host elsewhere"):
            acquire(tmp_path)
        assert time.monotonic() - started < 10
    finally:
        stop.set()
        thread.join()


def test_a_holder_shows_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    with one_writer(tmp_path, otherwise="-"):
        path = tmp_path / claims(tmp_path)[0]
        before = path.stat().st_mtime_ns
        until = time.monotonic() + 10
        while path.stat().st_mtime_ns == before:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_a_half_written_claim_is_waited_for_too(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 0.3)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.05)
    (tmp_path / "writer-7.lock").write_text('{"token": "a')
    started = time.monotonic()
    acquire(tmp_path)
    assert time.monotonic() - started >= 0.3


def test_of_many_that_find_a_dead_holder_one_takes_over(tmp_path):
    for attempt in range(15):
        folder = tmp_path / str(attempt)
        leave_claim(folder, number=attempt + 1, machine=machine(), pid=2**22 + 5, started="1")
        start, end, held = threading.Barrier(8), threading.Barrier(8), []

        def contend(folder=folder, start=start, end=end, held=held) -> None:
            start.wait()
            try:
                with one_writer(folder, otherwise="-"):
                    held.append(claims(folder))
                    end.wait()
            except UserError:
                end.wait()

        threads = [threading.Thread(target=contend) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(held) == 1 and claims(folder) == []


@pytest.mark.parametrize("how", ["removed", "taken over"])
def test_who_has_lost_the_folder_stops(tmp_path, monkeypatch, how):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    with pytest.raises(WorkError, match="no longer holds"):
        with one_writer(tmp_path, otherwise="-"):
            (tmp_path / "writer-1.lock").unlink()
            if how == "taken over":
                leave_claim(tmp_path)
            time.sleep(20)
            pytest.fail("was not stopped")
    assert claims(tmp_path) == (["writer-1.lock"] if how == "taken over" else []), "another's claim stays"


def test_files_of_one_folder_have_writers_of_their_own(tmp_path):
    with one_writer(tmp_path, "a.json", otherwise="-"), one_writer(tmp_path, "b.json", otherwise="-"):
        assert claims(tmp_path) == ["a.json.writer-1.lock", "b.json.writer-1.lock"]
        with pytest.raises(UserError, match=r"a\.json is being written"):
            with one_writer(tmp_path, "a.json", otherwise="-"):
                pass


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        acquire(tmp_path / "file" / "run")


def test_a_run_in_a_held_folder_begins_nothing(tmp_path, tiny_llama):
    recipe = make_recipe(settings(tmp_path, tiny_llama, methods={"dpo": {}}))
    folder = tmp_path / "runs" / "small"
    with holding(folder) as other:
        with pytest.raises(UserError, match=rf"pid {other.pid}(.|\n)*name="):
            run(recipe, folder, until="train")
        assert [path.name for path in folder.iterdir()] == claims(folder)


@pytest.mark.parametrize(
    "words",
    [
        ["judge", "o.json", "--reference", "o.json", "--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m"],
        ["agreement", "o.json", "--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "m"],
        ["report", "run"],
    ],
    ids=["judge", "agreement", "report"],
)
def test_verbs_that_write_a_folder_hold_it(tmp_path, words):
    (tmp_path / "o.json").write_text('[{"instruction": "q", "output": "a", "generator": "g"}]')
    with holding(tmp_path / "out") as other:
        done = otpo(tmp_path, *words, "--out", "out")
    refused(done, "out is being written", f"pid {other.pid}", "--out")


def test_outputs_are_held_file_by_file(tmp_path, tiny_llama):
    """Before an engine is loaded."""
    (tmp_path / "prompts.json").write_text('[{"instruction": "q"}]')
    with holding(tmp_path / "out", file="model_outputs.json") as other:
        done = otpo(tmp_path, "generate", tiny_llama, "--task", "prompts.json", "--max-tokens", "4", "--out", "out")
    refused(done, "out/model_outputs.json is being written", f"pid {other.pid}", "--out")


@pytest.mark.slow
def test_two_runs_at_once_and_then_one_after_a_kill(tmp_path, tiny_llama):
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {}}, train={"max_steps": 400, "save_every": 20})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    label = tmp_path / "runs" / "small" / "models" / "dpo"
    command = [sys.executable, "-m", "jobs.cli", "train", "recipe.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, env=environment)
    try:
        until = time.monotonic() + 200
        while not (label / "metrics.jsonl").exists() or (label / "metrics.jsonl").read_text().count("\n") < 30:
            assert time.monotonic() < until and first.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        second = otpo(tmp_path, "train", "recipe.yaml")
        refused(second, f"pid {first.pid}", "being written")
        print(f"the second was refused after {second.seconds:.1f} s")
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    third = otpo(tmp_path, "train", "recipe.yaml")
    assert third.code == 0, third.err
    assert len(losses(label)) == 400  # each step once: what the killed one left behind writes no more
