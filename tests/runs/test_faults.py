"""Training that is killed: workers, the driver, Ctrl-C. What comes out is what an undisturbed run gives."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

import psutil
import pytest
from support.command import STEPS, driving, same_run, workers_recipe

pytestmark = pytest.mark.slow


def part_of_ray(driver, name):
    """The process of this name that Ray has started beside the driver."""
    for process in driver.look():
        with suppress(psutil.NoSuchProcess):
            if process.name() == name:
                return process
    raise AssertionError(f"no {name} runs")


def test_a_killed_worker(tmp_path, tiny_llama, undisturbed):
    """Ray Train starts the group again, and the job goes on from its newest complete checkpoint."""
    with driving(workers_recipe(tmp_path, tiny_llama)) as driver:
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
    """Nothing outlives it, and the same command goes on, even where the kill has torn a checkpoint and Ray's record."""
    folder = workers_recipe(tmp_path, tiny_llama)
    with driving(folder) as driver:
        driver.wait_for(lambda: driver.steps() >= 17)
        driver.process.kill()
        driver.process.wait()
        assert not driver.left_behind()
    done = driver.steps()
    assert 17 <= done < STEPS and not (driver.label / "model").exists()
    newest = max((driver.label / "checkpoints").glob("step-*/complete.json")).parent
    shard = next(newest.glob("__1_*"))
    shard.write_bytes(shard.read_bytes()[:-50])
    snapshot = folder / "runs" / "small" / "ray" / "methods" / "checkpoint_manager_snapshot.json"
    snapshot.write_text(snapshot.read_text()[:-20])
    with driving(folder) as driver:
        assert driver.wait() == 0, driver.log.read_text()
        assert not driver.left_behind()
        assert f"checkpoint {newest.name} is not whole" in driver.log.read_text()
    assert newest.with_name(f"torn-{newest.name}").is_dir()
    same_run(driver.label, undisturbed)


@pytest.mark.parametrize("part", ["raylet", "gcs_server"])
def test_a_part_of_ray_dies_on_this_machine(tmp_path, tiny_llama, undisturbed, part):
    """Ray's native code ends the command without a word of Python's. It is told all the same, and Ray's dump is not.

    Of a raylet the command may hear first that the process that led training is gone with its node.
    """
    folder = workers_recipe(tmp_path, tiny_llama)
    with driving(folder) as driver:
        driver.wait_for(lambda: driver.steps() >= 7)
        part_of_ray(driver, part).kill()
        assert driver.wait(60) == 1
        assert not driver.left_behind()
        said = driver.log.read_text()
    assert said.count("failed: ") == 1 and "the same command goes on" in said, said
    assert "Ray has ended this command: " in said or (part == "raylet" and "is gone with its node" in said), said
    assert "state-dump" not in said and "core_worker.cc" not in said, said
    with driving(folder) as driver:
        assert driver.wait() == 0, driver.log.read_text()
        assert "failed" not in driver.log.read_text().replace(said, "")
    same_run(driver.label, undisturbed)


def test_a_head_that_does_not_answer_for_a_while(tmp_path, tiny_llama, undisturbed):
    """It is told with the time until which it is waited for, and when it answers again; training goes on meanwhile."""
    with driving(workers_recipe(tmp_path, tiny_llama)) as driver:
        driver.wait_for(lambda: driver.steps() >= 3)
        head = part_of_ray(driver, "gcs_server")
        head.suspend()
        driver.wait_for(lambda: "the head has not answered for 10 s; it is waited for until" in driver.log.read_text())
        head.resume()
        assert driver.wait() == 0, driver.log.read_text()
        assert "the head answers again" in driver.log.read_text()
    same_run(driver.label, undisturbed)


def test_ctrl_c(tmp_path, tiny_llama, undisturbed):
    """It ends within seconds, says that nothing is lost, and leaves nothing running."""
    folder = workers_recipe(tmp_path, tiny_llama)
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
    folder = workers_recipe(tmp_path, tiny_llama)
    blocked = folder / "runs" / "small" / "models" / "otpo" / "checkpoints"
    blocked.parent.mkdir(parents=True)
    blocked.touch()
    with driving(folder) as driver:
        assert driver.wait() == 1
        said = driver.log.read_text()
        assert "The same failure came twice" in said and "checkpoints" in said and "Traceback" not in said, said
        assert "failed 3 times" not in said
