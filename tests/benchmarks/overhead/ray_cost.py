"""What Ray costs: a training step inside a Ray Train worker beside the plain loop, outputs of actors beside raw vLLM.

python -m tests.benchmarks ray --turns 2

Both loops take the same micro-batches of the same tokens; both generations the same prompts and settings. Each side
runs in a process of its own, and the sides take turns. Steps and outputs are timed once everything is loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM = 10  # first steps, which are not counted
PAIRS = 16  # a step
PROMPTS = 256
TOKENS = 64  # of an output


def main(arguments: list[str]) -> None:
    """Print the median step of both loops and the tokens a second of both generations, and their ratios."""
    parser = argparse.ArgumentParser(prog="ray", description=__doc__)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--alone", nargs=3, metavar=("SIDE", "FOLDER", "TURN"), help="one side in this process")
    options = parser.parse_args(arguments)
    if options.alone:
        side, folder, turn = options.alone
        print(json.dumps(SIDES[side](Path(folder), int(turn), options.steps)))
        return
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), options.steps)
        for turn in range(options.turns):
            for side, values in found.items():
                words = ["ray", "--steps", str(options.steps), "--alone", side, folder, str(turn)]
                command = [sys.executable, "-m", "tests.benchmarks", *words]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                values += json.loads(done.stdout.splitlines()[-1])
                print(f"{side:12} turn {turn + 1}: {statistics.median(values):.4f}", flush=True)
    middle = {side: statistics.median(values) for side, values in found.items()}
    training, generation = middle["ray-train"] / middle["plain-loop"], middle["actors"] / middle["raw-vllm"]
    print(f"a step through Ray Train takes {training:.3f} of the plain loop's time")
    print(f"actors generate {generation:.3f} of raw vLLM's tokens a second")
    print(json.dumps({"benchmark": "ray", **middle, "training": training, "generation": generation}))


def prepare(folder: Path, steps: int) -> None:
    """Write a model of 10 M weights, pairs for the steps, and prompts."""
    from otpo.models.fresh import make_model, make_tokenizer

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnoprstuvw", k=draw.randint(2, 8))) for _ in range(2000)]

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(least, most)))

    tokenizer = make_tokenizer([text(50, 60) for _ in range(500)], vocab_size=4096)
    make_model(tokenizer, hidden=256, layers=8, heads=4, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(PAIRS * steps):
            row = {"prompt": text(8, 30), "chosen": text(8, 40), "rejected": text(8, 40)}
            file.write(json.dumps(row) + "\n")
    (folder / "prompts.json").write_text(json.dumps([text(8, 30) for _ in range(PROMPTS)]))


def _recipe(folder: Path, turn: int, steps: int) -> dict[str, Any]:
    # bf16 takes seconds a step on CPUs that do not compute in it
    train = {"workers": 1, "global_batch_size": PAIRS, "learning_rate": 1e-5, "max_steps": steps, "dtype": "fp32"}
    return {
        "name": f"turn{turn}",
        "model": {"path": str(folder / "model")},
        "data": {"path": str(folder / "pairs.jsonl"), "validation": 0.0},
        "methods": {"dpo": {}},
        "train": train,
    }


def ray_train(folder: Path, turn: int, steps: int) -> list[float]:
    """Seconds of each step of `otpo train`."""
    from pipeline import make_recipe, run_recipe

    recipe = make_recipe(**_recipe(folder, turn, steps))
    run_recipe(recipe, runs=str(folder / "runs"), until="train", progress=lambda *_: None)
    lines = (folder / "runs" / recipe.name / "models" / "dpo" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["seconds"] for line in lines][WARM:]


def plain_loop(folder: Path, turn: int, steps: int) -> list[float]:
    """Seconds of each step of a loop over what that run read, without Ray."""
    import torch
    from transformers import AutoModelForCausalLM

    from otpo.data.collate import collate_pairs
    from otpo.data.micro_batches import SIZES, TOKENS, micro_batches
    from otpo.data.sampler import next_indices
    from otpo.data.token_file import column, load_tokens
    from otpo.methods.spec import resolve
    from otpo.models.policy import PolicyModel
    from otpo.models.sharding import distribute
    from otpo.training.objectives.pair import preference_losses
    from otpo.training.optimizer import adamw
    from otpo.training.step import optimisation_step
    from pipeline.recipe import TrainConfig
    from tests.benchmarks.ours import one_worker

    train = TrainConfig(**_recipe(folder, turn, steps)["train"])
    (tokens,) = (folder / "runs" / f"turn{turn}" / "data").glob("*/train.safetensors")
    items = load_tokens(tokens)
    with one_worker() as mesh:
        device = mesh.device_type
        lm = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        model = distribute(PolicyModel(lm), mesh, dtype=torch.float32)
        optimizer = adamw(model, lr=train.learning_rate, weight_decay=train.weight_decay)
        known: dict[tuple[int, ...], Any] = {}

        def batches(members):
            lengths = column(members, "tokens").tolist()
            for chosen in micro_batches(lengths, size=SIZES[device], budget=TOKENS[device], rank=0, world=1):
                yield collate_pairs([members[i] for i in chosen]).to(device)

        def drawn(step):
            return [items[i] for i in next_indices(len(items), seed=train.seed, consumed=step * PAIRS, count=PAIRS)]

        with torch.no_grad():
            for step in range(steps):
                for batch in batches(drawn(step)):
                    known[tuple(batch.rows.tolist())] = model(batch)[0]
        losses = preference_losses(
            model, resolve("dpo", {}), lambda batch: {"reference": known[tuple(batch.rows.tolist())]}, seed=0
        )
        seconds = []
        for step in range(steps):
            began = time.perf_counter()
            members = drawn(step)
            optimisation_step(
                model, optimizer, batches(members), losses,
                denominator=len(members), max_grad_norm=train.max_grad_norm, lr=train.learning_rate,
            )  # fmt: skip
            seconds.append(time.perf_counter() - began)
    return seconds[WARM:]


def _config():
    from pipeline.generate.engine import EngineConfig, Sampling

    config = EngineConfig(backend="vllm", max_model_len=512)
    return config, Sampling(max_tokens=TOKENS, temperature=1.0)


def actors(folder: Path, turn: int, steps: int) -> list[float]:
    """Tokens a second of `EnginePool`, once its engine is loaded: what all prompts take."""
    from eval.tasks import Prompt
    from pipeline.cluster.connect import connect
    from pipeline.generate.pool import EnginePool

    config, sampling = _config()
    texts = json.loads((folder / "prompts.json").read_text())
    prompts = [Prompt(id=str(i), instruction=text, dataset="words") for i, text in enumerate(texts)]
    connect()
    with EnginePool(config, folder / "model") as pool:
        pool.generate(folder / "model", "warm", prompts[:8], sampling, folder / f"warm{turn}")
        began = time.perf_counter()
        made = pool.generate(folder / "model", "all", prompts, sampling, folder / f"all{turn}")
        return [made.report["tokens"] / (time.perf_counter() - began)]


def raw_vllm(folder: Path, turn: int, steps: int) -> list[float]:
    """Tokens a second of vLLM's own `LLM` on the same token ids, all in one call."""
    from otpo.data.encoder import encode_prompt
    from otpo.data.template import of_model
    from pipeline.generate.backends import VLLMEngine, environment, resolve
    from pipeline.generate.model_folder import open_model, tokenizer_of

    config, sampling = _config()
    model = open_model(folder / "model")
    config = resolve(config, model)
    os.environ |= environment(config, len(os.sched_getaffinity(0)))
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    llm = VLLMEngine(config, model).llm
    template, tokenizer = of_model("auto", model.path).for_generation, tokenizer_of(model)
    prompts = json.loads((folder / "prompts.json").read_text())
    ids = [encode_prompt(tokenizer, text, template) for text in prompts]
    stops = [model.config["eos_token_id"]]
    inputs = [TokensPrompt(prompt_token_ids=each) for each in ids]
    settings = [
        SamplingParams(
            temperature=sampling.temperature, max_tokens=TOKENS, seed=seed, stop_token_ids=stops, detokenize=False
        )
        for seed in range(len(ids))
    ]
    llm.generate(inputs[:8], settings[:8], use_tqdm=False)
    began = time.perf_counter()
    made = llm.generate(inputs, settings, use_tqdm=False)
    return [sum(len(output.outputs[0].token_ids) for output in made) / (time.perf_counter() - began)]


SIDES = {"ray-train": ray_train, "plain-loop": plain_loop, "raw-vllm": raw_vllm, "actors": actors}
