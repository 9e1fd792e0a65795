"""Throughput and peak memory of one preference step: ours (DPO and OTPO) beside TRL's DPO on the same pairs.

    python -m tests.benchmarks step 30m-short

Every side runs in a process of its own with the same allocator settings, bf16 compute on fp32 weights, and a reference
computed beforehand (TRL's best configuration). Tokens are counted as TRL does, the prompt twice.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

# glibc told to keep memory: page faults cost large short-lived tensors more than their arithmetic
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclass(frozen=True)
class Shape:
    """A model (tied vocabulary) and the ranges of prompt and answer lengths; four pairs a step."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    mlp: int
    prompt: tuple[int, int]
    answer: tuple[int, int]


LONG, SHORT = ((64, 448), (96, 464)), ((16, 48), (32, 64))
SHAPES = {
    "tiny-short": Shape(128, 2, 4, 2, 2000, 256, *SHORT),
    "30m-long": Shape(384, 6, 6, 2, 32000, 1024, *LONG),
    "30m-short": Shape(384, 6, 6, 2, 32000, 1024, *SHORT),
    "135m-long": Shape(576, 30, 9, 3, 49152, 1536, *LONG),
}
PAIRS = 4


def main(arguments: list[str]) -> None:
    """Run every side in its own process and print the comparison."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks step", description=__doc__)
    parser.add_argument("shape", nargs="?", default="30m-short", choices=SHAPES)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--side", choices=["dpo", "otpo", "trl"], help="one side alone, in this process")
    options = parser.parse_args(arguments)
    if options.side:
        side = _trl if options.side == "trl" else _ours
        print(json.dumps(side(options.shape, options.steps, options.side)))
        return
    sides = {name: _measure(options.shape, options.steps, name) for name in ("trl", "dpo", "otpo")}
    for name, figures in sides.items():
        print(f"{name:>5}  {figures['tokens_per_second']:10,.0f} tokens/s   peak {figures['peak_gib']:.2f} GiB")
    ratios = {
        "dpo_over_trl": sides["dpo"]["tokens_per_second"] / sides["trl"]["tokens_per_second"],
        "otpo_step_over_dpo_step": sides["otpo"]["step_seconds"] / sides["dpo"]["step_seconds"],
        "memory_over_trl": sides["dpo"]["above_model_gib"] / sides["trl"]["above_model_gib"],
    }
    print(json.dumps({"benchmark": "step", "shape": options.shape, **ratios, "sides": sides}))


def _measure(shape: str, steps: int, side: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks", "step", shape, "--steps", str(steps), "--side", side]
    done = subprocess.run(command, env=os.environ | ALLOCATOR, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def _pairs(shape: Shape, steps: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Token ids of prompt, chosen, rejected, without EOS; words below 3 are reserved."""
    rng = random.Random(0)

    def words(low: int, high: int) -> list[int]:
        return [rng.randrange(3, shape.vocab) for _ in range(rng.randint(low, high))]

    return [(words(*shape.prompt), words(*shape.answer), words(*shape.answer)) for _ in range(PAIRS * steps)]


def _config(shape: Shape):  # transformers is imported by the sides alone
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.mlp,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        max_position_embeddings=2048,
    )


def _figures(pairs: list, seconds: list[float], before: float) -> dict[str, float]:
    tokens = sum(2 * len(p) + len(c) + len(r) + 2 for p, c, r in pairs) / (len(pairs) / PAIRS)
    step, peak = statistics.median(seconds[1:]), _peak()
    return {
        "tokens_per_second": tokens / step,
        "step_seconds": step,
        "peak_gib": peak,
        "above_model_gib": peak - before,
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _ours(name: str, steps: int, method: str) -> dict[str, float]:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import LlamaForCausalLM

    from otpo.batches import collate_pairs
    from otpo.methods import resolve
    from otpo.model import PolicyModel, shard
    from otpo.records import TokenPair
    from otpo.step import optimisation_step, preference_losses

    shape = SHAPES[name]
    pairs = _pairs(shape, steps)
    items = [TokenPair(i, p, [*c, 1], [*r, 1]) for i, (p, c, r) in enumerate(pairs)]
    with tempfile.NamedTemporaryFile() as rendezvous:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous.name}", rank=0, world_size=1)
        torch.manual_seed(0)
        model = shard(
            PolicyModel(LlamaForCausalLM(_config(shape))).eval(), init_device_mesh("cpu", (1,)), dtype=torch.bfloat16
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        before, seconds = _peak(), []
        cached: dict[str, torch.Tensor] = {}
        losses = preference_losses(model, resolve(method, {}), lambda batch: cached, seed=0)
        for start in range(0, len(items), PAIRS):
            batch = collate_pairs(items[start : start + PAIRS])
            with torch.no_grad():
                cached["reference"] = model(batch)[0]  # beforehand, as a run's cache is: not timed
            began = time.perf_counter()
            optimisation_step(model, optimizer, [batch], losses, denominator=PAIRS, max_grad_norm=1.0, lr=1e-5)
            seconds.append(time.perf_counter() - began)
        dist.destroy_process_group()
    return _figures(pairs, seconds, before)


def _trl(name: str, steps: int, _: str) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    shape = SHAPES[name]
    pairs = _pairs(shape, steps)
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2} | {f"w{i}": i for i in range(3, shape.vocab)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")

    def text(ids: list[int]) -> str:
        return " ".join(f"w{i}" for i in ids)

    rows = [{"prompt": text(p), "chosen": " " + text(c), "rejected": " " + text(r)} for p, c, r in pairs]
    torch.manual_seed(0)
    model = LlamaForCausalLM(_config(shape))
    ticks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            ticks.append(time.perf_counter())

        def on_step_end(self, *_: object, **__: object) -> None:
            ticks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        options = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=PAIRS,
            max_steps=steps,
            learning_rate=1e-5,
            max_length=1024,
            report_to=[],
            save_strategy="no",
            gradient_checkpointing=False,
            bf16=True,
            use_cpu=True,
            precompute_ref_log_probs=True,
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            model=model,
            args=options,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        before = _peak()
        trainer.train()
    return _figures(pairs, [end - begin for begin, end in zip(ticks[::2], ticks[1::2], strict=True)], before)
