"""What workers ask of a cluster: a share of its CPUs, and their own pool of nodes where there is one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipeline.cluster.placement import cpus_per_worker

POOLS = """
import json, ray
from ray.cluster_utils import Cluster
from otpo.errors import UserError
from pipeline.cluster.placement import check_workers, node_pool, training_nodes

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0})
for pools in ({"train": 4}, {"generate": 1}):
    cluster.add_node(num_cpus=8, num_gpus=next(iter(pools.values())), resources=pools)
ray.init(address=cluster.address, log_to_driver=False, logging_level=40)
try:
    check_workers(5, use_gpu=True)
except UserError as error:
    refused = str(error)
found = {
    "pools": [node_pool("train"), node_pool("generate"), node_pool("other")],
    "cpus": [node["CPU"] for node in training_nodes()],
    "on_gpu": check_workers(4, use_gpu="auto"),
    "refused": refused,
}
print("FOUND" + json.dumps(found))
"""


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
def test_a_workers_cpus_stand_on_one_node(workers, cpus, share):
    assert cpus_per_worker(workers, cpus) == share


def test_pools_of_nodes_are_asked_for_where_there_are_any():
    """The generating node's GPU and CPUs are not counted as room for training."""
    done = subprocess.run([sys.executable, "-c", POOLS], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.split("FOUND")[1])
    assert found["pools"] == [{"train": 1.0}, {"generate": 1.0}, {}]
    assert found["cpus"] == [8.0] and found["on_gpu"] is True
    assert "the cluster has 4 GPUs for training. Set train.workers=4" in found["refused"]
