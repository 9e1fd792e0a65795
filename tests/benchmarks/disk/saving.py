"""How long training waits for a checkpoint, and what the same steps take in all, written beside them or waited for.

python -m tests.benchmarks saving --ranks 1 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import count
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SHAPE = {
    "vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8,
    "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 512,
}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Print, by number of ranks, seconds of waiting for a checkpoint and of steps with one save."""
    parser = argparse.ArgumentParser(prog="saving", description=__doc__)
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="after the save, in each round")
    parser.add_argument("--folder", help="on the disk that is measured; by default a temporary one")
    options = parser.parse_args(arguments)
    found = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for ranks in options.ranks:
            mp.spawn(_rank, (ranks, folder, options.rounds, options.steps), nprocs=ranks)
            found[ranks] = figures = json.loads(Path(folder, "figures.json").read_text())
            f = {name: f"{value:.2f}" for name, value in figures.items()}
            print(
                f"{ranks} ranks, {f['GB']} GB: training waits {f['waited']} s for a checkpoint, and {f['beside']} s"
                f" where it is written beside (complete after {f['complete']} s); {options.steps} steps and the save"
                f" take {f['steps waited']} s and {f['steps beside']} s",
                flush=True,
            )
    print(json.dumps({"benchmark": "saving", "ranks": found}))


def _rank(rank: int, ranks: int, folder: str, rounds: int, steps: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from otpo.data.collate import collate_pairs
    from otpo.methods.spec import resolve
    from otpo.models.checkpoint import CheckpointWriter, prune_checkpoints
    from otpo.models.policy import PolicyModel
    from otpo.models.sharding import distribute, mesh_of
    from otpo.records import TokenPair
    from otpo.training.objectives.pair import preference_losses
    from otpo.training.step import optimisation_step

    store = dist.FileStore(f"{folder}/store{ranks}", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    torch.manual_seed(0)
    lm: torch.nn.Module = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model = distribute(PolicyModel(lm), mesh_of("cpu", [range(ranks)]), dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    checkpoints, number = Path(folder, f"checkpoints{ranks}"), count(1)
    pairs = [TokenPair(i, *torch.randint(0, 32_000, (3, 64)).tolist()) for i in range(2)]
    batch, losses = [collate_pairs(pairs)], preference_losses(model, resolve("simpo", {}), lambda batch: {}, seed=0)
    writers = {"waited": CheckpointWriter(background=False), "beside": CheckpointWriter(background=True)}
    times: dict[str, list[float]] = {
        name: [] for name in ("waited", "beside", "steps waited", "steps beside", "complete")
    }

    def step() -> None:
        optimisation_step(model, optimizer, batch, losses, denominator=len(pairs), max_grad_norm=1.0, lr=1e-6)

    for _ in range(2):
        step()
    for _ in range(rounds):
        for name, writer in writers.items():
            dist.barrier()
            started = time.perf_counter()
            writer.save(checkpoints, model, optimizer, {"step": next(number)})
            times[name].append(time.perf_counter() - started)
            finished = None
            for _ in range(steps):
                step()
                if finished is None and name == "beside" and writer.done:
                    finished = time.perf_counter()
            times[f"steps {name}"].append(time.perf_counter() - started)
            writer.wait()
            if name == "beside":
                times["complete"].append((finished or time.perf_counter()) - started)
            if rank == 0:
                prune_checkpoints(checkpoints, 1, None)
    if rank == 0:
        size = 12 * sum(weight.numel() for weight in model.parameters()) / 1e9
        figures = {name: median(values) for name, values in times.items()} | {"GB": size}
        Path(folder, "figures.json").write_text(json.dumps(figures))
    dist.destroy_process_group()
