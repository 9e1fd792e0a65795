"""Sharding within nodes and replicating over them trains what sharding over all workers does, and what one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from support.small_lm import small_lm
from support.steps import weights
from torch.distributed.device_mesh import DeviceMesh

from otpo.data.collate import collate_pairs
from otpo.data.micro_batches import micro_batches
from otpo.methods.spec import resolve
from otpo.models.checkpoint import load_checkpoint, save_checkpoint
from otpo.models.export import export
from otpo.models.sharding import distribute, mesh_of
from otpo.records import SequenceBatch, TokenPair
from otpo.training.objectives.base import Start, load_policy
from otpo.training.objectives.pair import preference_losses
from otpo.training.optimizer import adamw
from otpo.training.step import optimisation_step

STEPS, LR = 4, 1e-2
PAIRS = [
    TokenPair(row, [3 + row, 5, 7 + row], [11 + (row * k) % 40 for k in range(1, 3 + row % 5)], [20 + row, 9, 8])
    for row in range(16)
]
NODES = {"full": [[0, 1, 2, 3]], "hybrid": [[0, 1], [2, 3]], "hybrid of four nodes": [[0], [1], [2], [3]]}


class Training:
    """OTPO from a folder, 16 pairs a step in micro-batches of 2."""

    def __init__(self, folder: str, mesh: DeviceMesh, *, reduce_each: bool):
        model = load_policy(Start(f"{folder}/start", deferred=mesh.size() > 1))
        self.model: Any = distribute(model, mesh, dtype=torch.float32)
        self.optimizer, self.reduce_each = adamw(self.model, lr=LR, weight_decay=0.0), reduce_each
        self.batches: list[SequenceBatch] = [
            collate_pairs([PAIRS[i] for i in group])
            for group in micro_batches(
                [p.tokens for p in PAIRS], size=2, budget=None, rank=dist.get_rank(), world=mesh.size()
            )
        ]
        with torch.no_grad():
            known = {id(batch): self.model(batch)[0] for batch in self.batches}
        self.losses = preference_losses(
            self.model, resolve("otpo", {}), lambda batch: {"reference": known[id(batch)]}, seed=0
        )

    def step(self) -> dict[str, float]:
        """The figures of a step."""
        return optimisation_step(
            self.model, self.optimizer, self.batches, self.losses,
            denominator=len(PAIRS), max_grad_norm=0.5, lr=LR, reduce_each=self.reduce_each,
        )  # fmt: skip


def _rank(rank: int, world: int, folder: str, tokenizer: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    torch.set_num_threads(1)
    for name, nodes in NODES.items():
        for each in (False, True):
            training = Training(folder, mesh_of("cpu", nodes), reduce_each=each)
            figures = [training.step() for _ in range(STEPS // 2)]
            path = save_checkpoint(Path(folder, f"{name} {each}"), training.model, training.optimizer, {"step": 2})
            figures += [training.step() for _ in range(STEPS // 2)]
            found = weights(training.model)
            export(
                training.model, Path(folder, f"{name} {each}", "model"), tokenizer=tokenizer, card="",
                dtype=torch.float32,
            )  # fmt: skip
            other = Training(folder, mesh_of("cpu", NODES["hybrid" if name == "full" else "full"]), reduce_each=each)
            load_checkpoint(path, other.model, other.optimizer)
            again = [other.step() for _ in range(STEPS // 2)]
            if rank == 0:
                Path(folder, f"{name} {each}.json").write_text(json.dumps([figures, again]))
                torch.save(found, Path(folder, f"{name} {each}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """What four ranks write in each way."""
    folder = tmp_path_factory.mktemp("hybrid")
    small_lm().save_pretrained(folder / "start")
    mp.spawn(_rank, (4, str(folder), str(tiny_llama)), nprocs=4)
    return folder


@pytest.fixture(scope="module")
def alone(trained: Path, mesh: DeviceMesh) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The figures and weights of one worker."""

    training = Training(str(trained), mesh, reduce_each=False)
    return [training.step() for _ in range(STEPS)], weights(training.model)


@pytest.mark.slow
@pytest.mark.parametrize("each", [False, True], ids=["reduced once", "reduced each"])
@pytest.mark.parametrize("name", NODES)
def test_it_trains_what_one_worker_does(trained, alone, name, each):
    figures, again = json.loads((trained / f"{name} {each}.json").read_text())
    expected, whole = alone
    for key in ("loss", "grad_norm", "rewards/margins"):
        assert [f[key] for f in figures] == pytest.approx([e[key] for e in expected], rel=1e-5, abs=1e-6)
        assert [f[key] for f in again] == pytest.approx([e[key] for e in expected[2:]], rel=1e-5, abs=1e-6)
    assert figures[-1]["loss"] < figures[0]["loss"] - 0.01
    found = torch.load(trained / f"{name} {each}.pt")
    exported = load_file(trained / f"{name} {each}" / "model" / "model.safetensors")
    for key, weight in whole.items():
        torch.testing.assert_close(found[key], weight, rtol=0, atol=1e-5)
        assert torch.equal(exported[key.removeprefix("lm.")], found[key])


ON_TWO_NODES = """
import json, sys
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from pipeline.recipe import make_recipe
from pipeline.run.run import run

model, work = Path(sys.argv[1]), Path(sys.argv[2])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 200_000_000})
for _ in range(2):
    cluster.add_node(num_cpus=2, object_store_memory=100_000_000)
ray.init(address=cluster.address, log_to_driver=False)
rows = [{"prompt": f"{n} + {n} = ", "chosen": f"{2 * n}, the sum", "rejected": f"{2 * n + 1}, or more"}
        for n in range(48)]
(work / "pairs.jsonl").write_text("".join(json.dumps(row) + chr(10) for row in rows))
train = {"max_steps": 4, "global_batch_size": 16, "micro_batch_size": 2, "use_gpu": False, "dtype": "fp32",
         "learning_rate": 1e-2, "warmup_ratio": 0.0}
for name, how in {"one": {"workers": 1}, "hybrid": {"workers": 4, "sharding": "hybrid"}}.items():
    recipe = make_recipe({"name": name, "model": {"path": str(model)}, "methods": {"otpo": {}}, "train": train | how,
                          "data": {"path": str(work / "pairs.jsonl"), "max_length": 64, "validation": 0}})
    run(recipe, work / name, until="train")
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
def test_two_nodes_of_two_workers_train_what_one_worker_does(tmp_path, tiny_llama):
    environment = os.environ | {"RAY_health_check_failure_threshold": "50"}
    command = [sys.executable, "-c", ON_TWO_NODES, str(tiny_llama), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    one, hybrid = (
        [json.loads(line) for line in (tmp_path / name / "models" / "otpo" / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "hybrid")
    )
    for key in ("loss", "grad_norm", "rewards/margins"):
        assert [h[key] for h in hybrid] == pytest.approx([o[key] for o in one], rel=1e-5, abs=1e-6)
    assert len(hybrid) == 4 and hybrid[-1]["loss"] < 0.5
