"""What a training worker's death is called, and that the terminal says it while the run goes on."""

from __future__ import annotations

import json
import signal
import time

import pytest
from support.command import driving, same_run, workers_recipe

from pipeline.events.log import EventReader, record
from pipeline.train.faults.causes import cause_of

OOM = """A worker health check failed.
1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: b7a8) was \
23.10GB used / 24.00GB limit (0.962500)
OOM kill reason: Memory usage 24804063999B exceeded threshold of 24481103872B (95.0% of 25769803776B limit)"""
KILLED = """A worker health check failed.
The actor died unexpectedly before finishing this task.
\tclass_name: RayTrainWorker
\tpid: 77
\tip: 10.0.0.7
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was \
killed by SIGKILL by OOM killer due to high memory usage."""
NODE = """A worker health check failed.
The actor died unexpectedly before finishing this task.
The actor died because its node has died. Node Id: 3f. the actor's node was terminated unexpectedly"""
CRASHED = """The actor died unexpectedly before finishing this task.
The actor is dead because its owner has died. Owner Id: 3f. exit detail: Owner's node has crashed."""
PEER = """Traceback (most recent call last):
  File "step.py", line 3, in step
RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3021"""
ERROR = """Traceback (most recent call last):
  File "step.py", line 3, in step
ValueError: no row 3."""


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        (OOM, "memory", ["rank 1 (process 77 on 10.0.0.7)", "23.10GB of 24.00GB", "96%"]),
        (KILLED, "killed", ["rank 1", "its process was killed"]),
        (NODE, "node", ["rank 1", "gone with its node"]),
        (CRASHED, "node", ["rank 1", "gone with its node"]),
        (ERROR, "error", ["rank 1", "raised ValueError: no row 3"]),
    ],
)
def test_the_cause_is_the_failure_that_explains_the_others(text, kind, words):
    failures = {0: RuntimeError(PEER), 1: RuntimeError(text), 2: RuntimeError(PEER)}
    cause = cause_of(failures, {1: "process 77 on 10.0.0.7"})
    assert cause.kind == kind
    for word in words:
        assert word in cause.text
    assert not cause.text.endswith(".")


def test_an_event_is_one_whole_line_and_read_once(tmp_path):
    path = tmp_path / "events.jsonl"
    record(path, "a", "before")
    reader = EventReader(path)
    record(path, "train dpo", "rank 1\nis gone \ud800")
    assert [(event.about, event.text[:12]) for event in reader.new()] == [("train dpo", "rank 1\nis go")]
    assert reader.new() == []
    with path.open("a") as file:
        file.write('{"time": "now", "pla')
    assert reader.new() == [], "a line that is being written"
    record(path / "not a folder" / "events.jsonl", "a", "b")


@pytest.mark.slow
def test_a_stopped_worker_is_named_within_a_minute_and_given_up(tmp_path, tiny_llama, undisturbed):
    folder = workers_recipe(tmp_path, tiny_llama, cluster={"silent_minutes": 0.75})
    with driving(folder) as driver:
        driver.wait_for(lambda: driver.steps() >= 7)
        stopped = driver.workers()[1]
        stopped.send_signal(signal.SIGSTOP)
        since = time.monotonic()
        driver.wait_for(lambda: f"process {stopped.pid} on" in driver.log.read_text(), seconds=60)
        assert "has not responded" in driver.log.read_text() and "cluster.silent_minutes" in driver.log.read_text()
        driver.wait_for(lambda: "started again" in driver.log.read_text(), seconds=180)
        assert time.monotonic() - since > 40
        assert driver.wait() == 0, driver.log.read_text()
        assert "no longer responded" in driver.log.read_text()
        assert not driver.left_behind()
    same_run(driver.label, undisturbed)
    events = [json.loads(line) for line in (folder / "runs" / "small" / "events.jsonl").read_text().splitlines()]
    assert any("started again" in event["text"] and event["place"] and event["time"] for event in events)


@pytest.mark.slow
def test_a_worker_that_rays_memory_monitor_kills_is_not_started_again(tmp_path, tiny_llama):
    """The threshold is so low that the first worker is over it."""
    folder = workers_recipe(tmp_path, tiny_llama)
    low = {"RAY_memory_usage_threshold": "0.02", "RAY_memory_monitor_refresh_ms": "250"}
    with driving(folder, **low) as driver:
        assert driver.wait() == 1
        said = driver.log.read_text()
        assert "ran out of memory" in said and "train.micro_batch_tokens" in said and "Traceback" not in said, said
        assert "start again" not in said


@pytest.fixture
def nodes():
    """A head without CPUs, and two nodes with a CPU each that training is placed on."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    added = [cluster.add_node(num_cpus=1, resources={"train": 1}) for _ in range(2)]
    cluster.wait_for_nodes()
    yield cluster, added
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [True, False])
def test_a_node_that_is_lost(tmp_path, tiny_llama, undisturbed, nodes, replaced):
    """It is told at once, waited for as long as the recipe says, and training goes on when another one comes."""
    cluster, (_, second) = nodes
    folder = workers_recipe(tmp_path, tiny_llama, cluster={"node_wait_minutes": 10 if replaced else 1})
    with driving(folder, RAY_ADDRESS=cluster.address) as driver:
        said = driver.log.read_text
        driver.wait_for(lambda: driver.steps() >= 7)
        cluster.remove_node(second, allow_graceful=False)
        driver.wait_for(lambda: "is gone" in said() and "room for 1 of 2 training workers" in said(), seconds=60)
        driver.wait_for(lambda: "there is no room for all training workers" in said(), seconds=90)
        if not replaced:
            assert driver.wait() == 1
            assert "no room for its workers for 1 minutes (cluster.node_wait_minutes)" in said()
            assert "Before that, rank" in said() and "the same command goes on" in said() and "Traceback" not in said()
            return
        cluster.add_node(num_cpus=1, resources={"train": 1})
        assert driver.wait() == 0, said()
        assert "has come" in said() and "goes on from the checkpoint of step" in said()
    same_run(driver.label, undisturbed)
