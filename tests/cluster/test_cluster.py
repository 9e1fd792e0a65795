"""What workers and engines ask of a cluster: a share of its CPUs, its GPUs, and nodes set apart for their kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.reward import export_reward_model
from transformers import AutoTokenizer

from otpo.errors import UserError
from otpo.models.fresh import make_model
from otpo.models.reward_model import RewardScorer
from pipeline.cluster.placement import (
    Node,
    TrainingRoom,
    allocate_trials,
    beside_judge,
    check_engines,
    engine_demands,
    fewer_engines,
)

TRAIN = {"CPU": 192, "GPU": 8, "train": 8}
GENERATE = {"CPU": 8, "GPU": 1, "generate": 1}


def machines(*shapes: tuple[int, int]) -> list[Node]:
    """Nodes of (CPUs, GPUs), none of them set apart."""
    return [{"CPU": cpus, "GPU": gpus} for cpus, gpus in shapes]


@pytest.mark.parametrize(
    ("workers", "cpus", "share"),
    [
        (2, [2], 1),
        (2, [8], 4),
        (3, [8], 2),
        (2, [8, 2], 4),
        (8, [48, 48], 12),
        (4, [48, 1], 12),
        (3, [2], 1),
        (1, [], 1),
    ],
)
def test_a_workers_cpus_stand_on_one_node(workers: int, cpus: list[int], share: int) -> None:
    room = TrainingRoom.of([{"CPU": count} for count in cpus])
    assert room.cpus_per_worker(workers, gpu=False) == share


@pytest.mark.parametrize(
    ("workers", "nodes", "share"),
    [
        (2, machines((192, 8)), 24),  # half a node each would leave six GPUs without a CPU
        (8, machines((192, 8)), 24),
        (1, machines((192, 8)), 24),
        (2, machines((8, 1), (192, 8)), 24),  # both on the large node
        (9, machines((8, 1), (192, 8)), 8),  # the small node's worker has but 8
        (4, machines((6, 4)), 1),
        (8, [TRAIN, GENERATE], 24),
    ],
)
def test_a_gpus_worker_has_at_most_its_gpus_share_of_the_cpus(workers: int, nodes: list[Node], share: int) -> None:
    assert TrainingRoom.of(nodes).cpus_per_worker(workers, gpu=True) == share


def test_workers_that_no_node_has_room_for_are_refused() -> None:
    room = TrainingRoom.of([TRAIN, GENERATE])
    assert room.check(8, use_gpu=True) and room.gpus == 8
    with pytest.raises(UserError, match=r"has 8 GPUs for training\. Set train\.workers=8"):
        room.check(9, use_gpu=True)
    with pytest.raises(UserError, match=r"8 GPUs for training with room for 4: .* a CPU \(there are 192\) and a unit"):
        TrainingRoom.of([TRAIN | {"train": 4}]).check(8, use_gpu=True)
    with pytest.raises(UserError, match=r"8 GPUs with room for 2: .* a CPU \(there are 2\) too\. Set train\.workers=2"):
        TrainingRoom.of(machines((2, 8))).check(8, use_gpu=True)
    with pytest.raises(UserError, match=r"has 8 GPUs with room for 0: .* Give these nodes what is missing"):
        TrainingRoom.of(machines((0, 8))).check(1, use_gpu=True)
    with pytest.raises(UserError, match=r"has 8 CPUs for training with room for 2: .* a unit of the resource `train`"):
        TrainingRoom.of([{"CPU": 8, "train": 2}]).check(4, use_gpu=False)


def test_gpus_that_auto_leaves_idle_are_told() -> None:
    one = TrainingRoom.of(machines((8, 1)))
    assert one.check(2, use_gpu="auto") is False and one.check(1, use_gpu="auto") is True
    assert "set train.workers=1 to train on the GPU" in str(one.why_on_cpu(2, use_gpu="auto"))
    assert one.why_on_cpu(1, use_gpu="auto") is None and one.why_on_cpu(2, use_gpu=False) is None
    assert TrainingRoom.of(machines((8, 0))).why_on_cpu(2, use_gpu="auto") is None


@pytest.mark.parametrize(
    ("workers", "gpus", "nodes", "found"),
    [
        (4, 1, [TRAIN, GENERATE], [{"generate": 1}, *3 * [{"train": 1}]]),  # the training GPUs idle meanwhile
        (4, 1, [TRAIN, *4 * [GENERATE]], 4 * [{"generate": 1}]),
        (2, 4, [TRAIN, GENERATE], 2 * [{"train": 4}]),  # as many units as GPUs, all on one node
        (3, 4, [TRAIN, GENERATE], 2 * [{"train": 4}]),
        (1, 16, [TRAIN, TRAIN], []),  # no engine spans nodes
        (1, 2, [GENERATE, GENERATE], []),
        (2, 2, [{"CPU": 8, "GPU": 4, "generate": 2}], [{"generate": 2}]),  # units that are missing
        (3, 2, machines((8, 3), (8, 2)), 2 * [{}]),  # nothing is set apart; a GPU is left over
        (3, 0, machines((8, 0)), 3 * [{}]),
        (3, 0, [{"CPU": 8, "generate": 2}], 2 * [{"generate": 1}]),
    ],
)
def test_engines_ask_for_units_of_the_pool_that_has_them(
    workers: int, gpus: int, nodes: list[Node], found: list[Node]
) -> None:
    assert engine_demands(workers, gpus, nodes) == found


def test_engines_that_fit_nowhere_are_refused_and_missing_ones_told() -> None:
    with pytest.raises(UserError, match=r"engines of 16 GPUs .* the largest node has 8"):
        check_engines(1, 16, [TRAIN, TRAIN])
    with pytest.raises(UserError, match=r"engines of 4 GPUs"):
        check_engines(1, 4, [TRAIN, GENERATE], on_training_nodes=False)
    # units are what engines ask for, and nodes without any take none
    with pytest.raises(UserError, match=r"largest node has 8, with 1 of the resource `generate`, .* start the node"):
        check_engines(1, 4, [{"CPU": 64, "GPU": 8, "generate": 1}])
    with pytest.raises(UserError, match=r"the largest node of those for engines has 1\. Lower"):
        check_engines(1, 4, [GENERATE, {"CPU": 64, "GPU": 8}])
    with pytest.raises(UserError, match=r"judge\.vllm\.tensor_parallel_size makes engines of 2 .* largest node has 1"):
        beside_judge(2, machines((8, 1)))
    assert fewer_engines(4, 4, waiting=True) is None
    assert "1 of 4 engines" in str(fewer_engines(4, 1, waiting=False))


@pytest.mark.parametrize(
    ("nodes", "engines", "engine_gpus", "expected"),
    [
        ([TRAIN, GENERATE], 1, 1, (4, 24, True)),  # the engine has a node of its own: all eight GPUs train
        ([TRAIN, GENERATE], 4, 1, (4, 24, True)),
        ([TRAIN, GENERATE], 1, 4, (1, 24, False)),  # it fits only where training is: they take turns
        (machines((64, 8)), 1, 1, (3, 8, True)),  # one of the eight GPUs stays the engine's
        (machines((64, 8)), 0, 1, (4, 8, True)),
    ],
)
def test_engines_take_from_training_only_what_they_share(
    nodes: list[Node], engines: int, engine_gpus: int, expected: tuple[int, int, bool]
) -> None:
    found = allocate_trials(nodes, trials=8, workers=2, engines=engines, engine_gpus=engine_gpus, on_gpu=True)
    assert (found.concurrent, found.cpus, found.keep_engine) == expected


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        (machines((64, 8)), [6]),
        (machines((64, 8), (64, 2), (64, 1)), [8, 0, 1]),  # the smallest node that has room
        ([TRAIN, {"CPU": 64, "GPU": 4, "generate": 4}], [8, 2]),
    ],
)
def test_a_served_judge_takes_its_gpus_from_one_node(nodes: list[Node], left: list[int]) -> None:
    found = beside_judge(2, nodes)
    assert [node["GPU"] for node in found] == left
    assert [node.get("generate", node["GPU"]) for node in found] == left
    assert beside_judge(0, nodes) == nodes


POOLS = """
import json, sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from otpo.errors import UserError
from pipeline.cluster.placement import grows, training_room
from pipeline.generate.engine import EngineConfig, Sampling
from pipeline.generate.pool import EnginePool
from pipeline.judge.reward_model import RewardJudge
from pipeline.recipe import make_recipe
from pipeline.run.run import run
from eval.tasks import Prompt

work, model, rewards = map(Path, sys.argv[1:])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0})
cluster.add_node(num_cpus=8, num_gpus=4, resources={"train": 4})
cluster.add_node(num_cpus=2, num_gpus=1, resources={"generate": 1})
ray.init(address=cluster.address, log_to_driver=False, logging_level=40)
found = {"on_gpu": training_room().check(4, use_gpu="auto"), "grows": grows()}

# a misfit that only generation would meet, and one of training: refused before anything is trained
tree = {"model": {"path": str(model)}, "data": {"path": str(work / "pairs.jsonl")}, "methods": {"dpo": {}},
        "judge": {"reward_model": str(rewards)}, "train": {"max_steps": 1, "workers": 1, "warmup_ratio": 0},
        "generate": {"tasks": [str(work / "prompts.jsonl")]}}
for section, change in {"generate": {"tensor_parallel_size": 8}, "train": {"workers": 5, "use_gpu": True}}.items():
    try:
        run(make_recipe({**tree, "name": section, section: tree[section] | change}), work / "runs" / section)
    except UserError as error:
        found[section] = str(error)
    found["trained " + section] = (work / "runs" / section / "models").exists()

# three engines where one has a node of its own: the others borrow idle training GPUs, by the pool's units
config = EngineConfig(backend="transformers", device="cpu", workers=3, max_model_len=64, batch_size=2)
prompts = [Prompt(str(i), f"Say {i}.", "test") for i in range(12)]
with EnginePool(config, model) as pool:
    outputs = pool.generate(model, "a", prompts, Sampling(max_tokens=4), work / "three").outputs
    left = ray.available_resources()
    found["taken"] = {name: int(total - left.get(name, 0)) for name, total in
                      (("generate", 1), ("train", 4))}
with EnginePool(EngineConfig(backend="transformers", device="cpu", max_model_len=64), model) as pool:
    found["same"] = outputs == pool.generate(model, "a", prompts, Sampling(max_tokens=4), work / "one").outputs

# a reward model scores on a GPU, in a process of its own, and gives it back
judge = RewardJudge(rewards)
found["scores"] = judge([("Say 1.", "one"), ("Say 1.", "two")])
found["gpus_of_scorer"] = 5 - ray.available_resources().get("GPU", 0)
judge.unload()
print("FOUND" + json.dumps(found))
ray.shutdown()
cluster.shutdown()
"""


def in_a_process(script: str, *words: Path) -> Any:
    """What a script that has a cluster of its own finds."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=600,
        # on a busy machine a node that is slow to answer is not a dead one
        env=os.environ | {"RAY_health_check_failure_threshold": "50"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("FOUND")[1])


@pytest.mark.slow
def test_pools_of_nodes_are_asked_for_where_there_are_any(tmp_path: Path, tiny_llama: Path) -> None:
    """A real cluster with declared GPUs: what does not fit is refused, and what fits is placed where it belongs."""
    pair = {"prompt": "Say one.", "chosen": "one", "rejected": "two"}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair | {"prompt": f"Say {i}."}) + "\n" for i in range(40)))
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"instruction": "Say one."}) + "\n")
    rewards = export_reward_model(tiny_llama, tmp_path / "rewards")
    model, tokenizer = tmp_path / "model", AutoTokenizer.from_pretrained(tiny_llama)
    make_model(tokenizer, hidden=256, layers=1, heads=8).save_pretrained(model)
    tokenizer.save_pretrained(model)
    found = in_a_process(POOLS, tmp_path, model, rewards)
    assert found["on_gpu"] is True and found["grows"] is False
    assert "engines of 8 GPUs" in found["generate"] and "has 4 GPUs for training" in found["train"]
    assert not found["trained generate"] and not found["trained train"]
    assert found["taken"] == {"generate": 1, "train": 2} and found["same"]
    assert found["gpus_of_scorer"] == 1
    here = RewardScorer(rewards)(["Say 1."] * 2, ["one", "two"])
    assert found["scores"] == pytest.approx(here, abs=1e-5) and here[0] != here[1]


GROWING = """
import json, os, sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from pipeline.cluster.placement import grows
from pipeline.generate.engine import EngineConfig, Sampling
from pipeline.generate.pool import EnginePool
from eval.tasks import Prompt

work, model = map(Path, sys.argv[1:])
os.environ["RAY_NODE_TYPE_NAME"] = "generate"  # as autoscalers start their nodes
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0})
cluster.add_node(num_cpus=2, resources={"generate": 1})
ray.init(address=cluster.address, log_to_driver=False, logging_level=40)
prompts, said = [Prompt(str(i), f"Say {i}.", "test") for i in range(8)], []
config = EngineConfig(backend="transformers", device="cpu", workers=2, max_model_len=64, batch_size=1)
with EnginePool(config, model) as pool:
    say = lambda what, done, total, remark: said.append(remark)
    early = pool.generate(model, "a", prompts, Sampling(max_tokens=4), work / "early", progress=say).outputs
    cluster.add_node(num_cpus=2, resources={"generate": 1})
    ray.wait(list(pool._engines.ready), num_returns=2, timeout=300)
    late = pool.generate(model, "a", prompts, Sampling(max_tokens=4), work / "late", progress=say).outputs
print("FOUND" + json.dumps({"grows": grows(), "said": said, "same": early == late, "outputs": len(early)}))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_an_engine_whose_node_comes_late_joins_the_others(tmp_path: Path, tiny_llama: Path) -> None:
    found = in_a_process(GROWING, tmp_path, tiny_llama)
    assert found["grows"] and found["same"] and found["outputs"] == 8
    assert len(found["said"]) == 16 and all(remark.endswith(", 1 of 2 engines") for remark in found["said"][:8])
    assert not any("engines" in remark for remark in found["said"][8:])
