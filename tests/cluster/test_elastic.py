"""Training on as many workers as there is room for: nodes come, nodes go after a notice, and the losses stay."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from support.training import settings

from pipeline.recipe import make_recipe
from pipeline.recipe.sections import TrainConfig
from pipeline.sweep.search import plan
from pipeline.sweep.trial_recipes import trial_training
from pipeline.sweep.tuner import allocate_trials


def test_a_range_of_workers_is_min_workers_and_workers():
    assert TrainConfig(workers=[1, 4]) == TrainConfig(min_workers=1, workers=4)
    assert TrainConfig(workers=[1, 4]).fewest_workers == 1 and TrainConfig(workers=4).fewest_workers == 4
    again = make_recipe({"name": "x", "model": {"path": "a/b"}, "data": {"path": "c/d"}, "methods": {"dpo": {}},
                         "train": {"workers": [2, 3]}})  # fmt: skip
    assert make_recipe(again.model_dump(mode="json")).train == again.train


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"workers": [1, 2, 3]}, "expected a number or"),
        ({"workers": [4, 2]}, "min_workers is 4, more than workers, 2"),
        ({"workers": [0, 2]}, "min_workers"),
        ({"workers": [1, 2], "max_failures": 0}, "needs max_failures"),
    ],
)
def test_ranges_that_mean_nothing_are_refused(values, words):
    with pytest.raises(ValidationError, match=words):
        TrainConfig(**values)


def test_trials_of_a_sweep_have_the_fewest_workers_each(tmp_path, tiny_llama, ray_cluster):
    """A cluster of two CPUs; each of 64 workers at most would leave room for no trial beside it."""
    tree = settings(tmp_path, tiny_llama, methods={"otpo": {}}) | {"sweep": {"params": {"methods.otpo.reg": [0.1, 1]}}}
    tree["train"] |= {"workers": [1, 64], "max_failures": 1}
    tree["sweep"]["metric"], tree["data"] = "eval_loss", tree["data"] | {"validation": 0.2}
    tree["train"]["eval_every"] = 2
    recipe = make_recipe(tree)
    assert allocate_trials(recipe, plan(recipe)[0]).concurrent == 2
    fixed = trial_training(recipe, "otpo")
    assert (fixed.workers, fixed.min_workers) == (1, None)


NODES_COME_AND_GO = """
import json, subprocess, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
import pipeline.train.launcher as launcher
from pipeline.recipe import make_recipe
from pipeline.run.run import run

model, work = Path(sys.argv[1]), Path(sys.argv[2])
launcher.RESIZE_SECONDS = 2.0
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 200_000_000})
cluster.add_node(num_cpus=1, object_store_memory=100_000_000)
ray.init(address=cluster.address, log_to_driver=False)
words = "alpha beta gamma delta epsilon zeta eta theta".split()
rows = [{"prompt": f"{n} + {n} = ", "chosen": f"{2 * n} " + " ".join(words[n % 7:]), "rejected": f"{2 * n + 1}, or"}
        for n in range(64)]
(work / "pairs.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
train = {"max_steps": 240, "global_batch_size": 32, "micro_batch_size": 2, "use_gpu": False, "dtype": "fp32",
         "learning_rate": 1e-3, "save_every": 10}


def recipe(name, workers):
    return make_recipe({"name": name, "model": {"path": str(model)}, "methods": {"otpo": {}},
                        "data": {"path": str(work / "pairs.jsonl"), "max_length": 64, "validation": 0},
                        "train": train | {"workers": workers}})


def step():
    path = work / "elastic" / "models" / "otpo" / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def events():
    path = work / "elastic" / "events.jsonl"
    return path.read_text() if path.exists() else ""


def until(condition):
    ends = time.monotonic() + 200
    while not condition():
        if time.monotonic() > ends:
            print("waited in vain", step(), events(), file=sys.stderr, flush=True)
            return
        time.sleep(0.1)


def nodes():  # not by cluster.add_node, which wants the main thread
    until(lambda: step() >= 15)
    before = {each["NodeID"] for each in ray.nodes()}
    start = [sys.argv[3], "start", "--address", cluster.address, "--num-cpus=1", "--block"]
    added = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: "started again with 2 workers" in events())
    marks = lambda: "".join(p.read_text() for p in work.glob("elastic/models/otpo/checkpoints/*/complete.json"))
    until(lambda: '"world": 2' in marks())
    (node,) = (each for each in ray.nodes() if each["Alive"] and each["NodeID"] not in before)
    subprocess.run([sys.argv[3], "drain-node", "--address", cluster.address, "--node-id", node["NodeID"],
                    "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
                    "--deadline-remaining-seconds", "120"], check=True)
    until(lambda: "saved after step" in events())
    added.terminate()


thread = threading.Thread(target=nodes, daemon=True)
thread.start()
run(recipe("elastic", [1, 2]), work / "elastic", until="train")
thread.join()
run(recipe("one", 1), work / "one", until="train")
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_one_worker_then_two_then_one_train_what_one_does(tmp_path, tiny_llama):
    """A second node comes; then it is taken away with a notice: the group saves, and no step is done again."""
    environment = os.environ | {"RAY_health_check_failure_threshold": "50", "OMP_NUM_THREADS": "1"}
    ray = str(Path(sys.executable).parent / "ray")
    command = [sys.executable, "-c", NODES_COME_AND_GO, str(tiny_llama), str(tmp_path), ray]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    events = (tmp_path / "elastic" / "events.jsonl").read_text()
    assert "waited in vain" not in done.stderr, done.stderr[-3000:]
    texts = [json.loads(line)["text"] for line in events.splitlines()]
    assert any("another number of workers" in text for text in texts), texts
    (saved,) = (int(m[1]) for text in texts if (m := re.match(r"saved after step (\d+)", text)))
    resumed = [int(m[1]) for text in texts if (m := re.match(r"goes on from the checkpoint of step (\d+)", text))]
    assert resumed[-1] == saved, "no step is done again"
    assert not any("restart" in text and "of at most" in text for text in texts), "no attempt counts as a failure"
    one, elastic = (
        [json.loads(line) for line in (tmp_path / name / "models" / "otpo" / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "elastic")
    )
    assert [line["step"] for line in elastic] == [line["step"] for line in one] == list(range(1, 241))
    # gradients that have almost vanished keep fewer digits of a sum in another order than losses do
    for key, tolerance in (("loss", 1e-5), ("rewards/margins", 1e-5), ("grad_norm", 1e-4)):
        assert [e[key] for e in elastic] == pytest.approx([o[key] for o in one], rel=tolerance, abs=tolerance)
    assert elastic[-1]["loss"] < 0.1
