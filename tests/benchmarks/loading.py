"""What ranks hold at most while a model of 0.5B is read and exported, beside the shards they keep.

python -m tests.benchmarks loading --ranks 2 4
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import Qwen2Config, Qwen2ForCausalLM

MIB = 2**20
FILE_BYTES = 200_000_000
SHAPE = {
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Print, by number of ranks, the most that a rank held, and what it may hold."""
    parser = argparse.ArgumentParser(prog="loading", description=__doc__)
    parser.add_argument("--ranks", nargs="*", type=int, default=[2, 4])
    options = parser.parse_args(arguments)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        Qwen2ForCausalLM(Qwen2Config(**SHAPE)).to(torch.bfloat16).save_pretrained(Path(folder, "model"))
        for ranks in options.ranks:
            mp.spawn(_rank, (ranks, folder), nprocs=ranks)
            each = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ranks)]
            found[ranks] = most = {name: max(figures[name] for figures in each) for name in each[0]}
            print(
                f"{ranks} ranks: a shard of {most['shard']:,.0f} MiB, the largest weight {most['layer']:,.0f}; reading"
                f" took {most['reading']:,.0f} at most, exporting in files of {FILE_BYTES / MIB:,.0f}"
                f" {most['exporting']:,.0f} beside the shards",
                flush=True,
            )
    print(json.dumps({"benchmark": "loading", "ranks": found}))


def _rank(rank: int, ranks: int, folder: str) -> None:
    from otpo.models.disk.writer import write_weights
    from otpo.models.gathered import gathered_weights
    from otpo.models.policy import PolicyModel
    from otpo.models.sharding import shard
    from otpo.training.objectives.base import Start, load_policy

    store = dist.FileStore(f"{folder}/store{ranks}", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    mesh, path = init_device_mesh("cpu", (ranks,)), f"{folder}/model"
    models: list[PolicyModel] = []

    def read() -> None:
        models.append(shard(load_policy(Start(path, deferred=True)), mesh, dtype=torch.bfloat16))

    def write() -> None:
        parts = gathered_weights(models[0], torch.bfloat16)
        if rank == 0:
            write_weights(Path(folder), parts, file_bytes=FILE_BYTES)
        else:
            for _ in parts:
                pass

    sizes = {"reading": _most(read), "exporting": _most(write)}
    weights = list(models[0].parameters())
    sizes["shard"] = sum(weight.to_local().nbytes for weight in weights if isinstance(weight, DTensor)) / MIB
    sizes["layer"] = max(weight.numel() * weight.element_size() for weight in weights) / MIB
    Path(folder, f"{rank}.json").write_text(json.dumps(sizes))
    dist.destroy_process_group()


def _most(work: Callable[[], object]) -> float:
    """MiB of memory of its own, mapped files left out, that this process gains at most while it works."""
    before, most, done = _own(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, _own())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return (max(most, _own()) - before) / MIB


def _own() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])
