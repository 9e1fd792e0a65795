"""Throughput and peak memory of one preference step: ours beside TRL's DPO and the official OTPO step, on equal pairs.

    make bench-step SHAPE=30m-short

Two sides at a time, each in a process of its own, take turns of a few steps (`tests.benchmarks.turns`); more would not
fit into memory beside TRL. All compute in bf16 on fp32 weights, with the same allocator settings and, where the side
can, a reference computed beforehand (TRL's best configuration; the official OTPO code cannot). `trl-as-installed` is
TRL with its live reference and without the allocator settings, `dpo-compiled` ours with `train.torch_compile: true`
(a GPU compiles anyway). Tokens are counted as TRL counts them, the prompt twice. Memory is the peak above the loaded
model.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from typing import Any

from tqdm import tqdm

from otpo.kernels.cpu.allocator import ALLOCATOR
from tests.benchmarks.shapes import LORA, PAIRS, SHAPES, Shape
from tests.benchmarks.turns import TURN, counted, ratios, turns

SIDES = ("trl", "trl-liger", "dpo", "dpo-compiled", "otpo", "official-otpo", "trl-as-installed")
COMPARED = {
    "trl_step_over_dpo_step": ("trl", "dpo"),
    "trl_step_over_dpo_compiled_step": ("trl", "dpo-compiled"),
    "trl_liger_step_over_dpo_step": ("trl-liger", "dpo"),
    "trl_as_installed_step_over_dpo_step": ("trl-as-installed", "dpo"),
    "otpo_step_over_dpo_step": ("otpo", "dpo"),
    "official_otpo_step_over_ours": ("official-otpo", "otpo"),
}
READY, RESULT = "<ready>", "<result>"  # printed by a side for the process that gives the turns
RATED_TFLOPS = {"H100": 989, "H200": 989, "A100": 312}  # dense bfloat16, from the data sheets


def main(arguments: list[str]) -> None:
    """Run the comparisons between the chosen sides, print each, then all figures as one JSON line."""
    parser = argparse.ArgumentParser(prog="tests.benchmarks step", description=__doc__)
    parser.add_argument("shape", nargs="?", default="30m-short", choices=SHAPES)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of a step")
    parser.add_argument("--checkpointing", choices=("yes", "no"), help="of activations; unset: as the shape")
    parser.add_argument("--turn", type=int, default=TURN, help="steps of a side in a row; with 1 all are counted")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=_sides())
    parser.add_argument("--side", choices=SIDES, help="run one side, as the comparison starts it")
    options = parser.parse_args(arguments)
    if options.side:
        run = {"dpo": _ours, "dpo-compiled": _ours, "otpo": _ours, "official-otpo": _official}.get(options.side, _trl)
        print(RESULT + json.dumps(run(_shape(options), options.steps, options.side)), flush=True)
        return
    numbers = counted(options.steps, options.turn)
    tokens = _shape(options).tokens(options.steps)
    as_told = [options.shape, "--steps", str(options.steps), "--pairs", str(options.pairs)]
    as_told += ["--checkpointing", options.checkpointing] if options.checkpointing else []
    comparisons = {}
    for name, (one, other) in COMPARED.items():
        if not {one, other} <= set(options.sides):
            continue
        sides = _in_turns(as_told, options.steps, options.turn, [one, other])
        for side, of in sides.items():
            seconds = of["seconds"]
            of["step_seconds"] = statistics.median(seconds[number] for number in numbers)
            of["tokens_per_second"] = statistics.median(tokens[number] / seconds[number] for number in numbers)
            print(
                f"{side:>16}  {of['tokens_per_second']:8,.0f} tokens/s  step {of['step_seconds']:7.3f} s"
                f"  {of['above_model_gib']:6.2f} GiB above the model"
            )
        over = ratios(sides[one]["seconds"], sides[other]["seconds"], numbers)
        print(f"{name.replace('_', ' ')}: {over['median']:.2f} ({over['low']:.2f} to {over['high']:.2f})", flush=True)
        memory = sides[other]["above_model_gib"] / sides[one]["above_model_gib"]
        comparisons[name] = {"ratio": over, "memory_of_the_latter_over_the_former": memory, "sides": sides}
    if not comparisons:
        known = "; ".join(" ".join(pair) for pair in COMPARED.values())
        raise SystemExit(f"--sides {' '.join(options.sides)}: expected two or more that are compared: {known}.")
    told = {"shape": options.shape, "steps": options.steps, "pairs": options.pairs}
    print(json.dumps({"benchmark": "step", **told, **comparisons}))


def _shape(options: argparse.Namespace) -> Shape:
    """The shape, with what the command line says of its steps."""
    shape = dataclasses.replace(SHAPES[options.shape], step_pairs=options.pairs)
    if options.checkpointing:
        shape = dataclasses.replace(shape, checkpointing=options.checkpointing == "yes")
    return shape


def _sides() -> list[str]:
    """The sides that run here: Liger's kernels need a GPU, `official-otpo` and the allocator settings a CPU."""
    if _device() == "cpu":
        return [side for side in SIDES if side != "trl-liger"]
    liger = importlib.util.find_spec("liger_kernel") is not None
    return ["trl", *(["trl-liger"] if liger else []), "dpo", "otpo"]


def _in_turns(as_told: list[str], steps: int, turn: int, names: list[str]) -> dict[str, dict[str, Any]]:
    """Start the sides one after the other, then let them take turns; the result of each.

    Args:
        as_told: the command line of a side, but its name.
    """
    sides: dict[str, subprocess.Popen[str]] = {}
    try:
        for name in names:
            sides[name] = _start(as_told, name)
            _until(READY, sides[name], name)
        results = {}
        for name, numbers in tqdm(list(turns(names, steps, turn)), desc=" ".join(names), unit="turn", disable=None):
            for step in numbers:
                stdin = sides[name].stdin
                assert stdin is not None
                with suppress(BrokenPipeError):  # a dead side is reported below
                    stdin.write("\n")
                    stdin.flush()
                results[name] = _until(READY if step + 1 < steps else RESULT, sides[name], name)
        return {name: json.loads(results[name]) for name in names}
    finally:
        for process in sides.values():
            process.kill()


def _start(as_told: list[str], side: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.benchmarks", "step", *as_told, "--side", side]
    plain = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
    environment = plain if side == "trl-as-installed" else plain | ALLOCATOR
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _until(word: str, process: subprocess.Popen[str], side: str) -> str:
    """The rest of the next line that begins with a word of ours; lines of the libraries are skipped."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line.removeprefix(word)
    raise SystemExit(
        f"{side} ended early with exit status {process.wait()} (-9: it was killed, mostly because memory ran out: take"
        " fewer steps)."
    )


def _await_turn() -> None:
    """Report that the next step is ready, and wait for this side's turn."""
    print(READY, flush=True)
    sys.stdin.readline()


def floor(shape: Shape, pairs: list) -> dict[str, float]:
    """Seconds that a step's matrix products alone would take at the best rate that this machine reaches on one of them.

    On a GPU whose rated speed is known, also the seconds at that speed; divided by the step's they are its MFU.
    """
    import torch

    device = _device()
    rows, inner, columns = (8192, 8192, 8192) if device == "cuda" else (2048, 1024, 4096)
    x, w = (torch.randn(n, inner, dtype=torch.bfloat16, device=device) for n in (rows, columns))
    rate = 0.0
    for _ in range(12):
        _synchronize()
        began = time.perf_counter()
        torch.nn.functional.linear(x, w)
        _synchronize()
        rate = max(rate, 2 * rows * inner * columns / (time.perf_counter() - began))
    flops = shape.flops(pairs) / (len(pairs) / shape.step_pairs)
    found = {"matmul_floor_seconds": flops / rate, "matmul_tflops": rate / 1e12}
    name = torch.cuda.get_device_name() if device == "cuda" else ""
    rated = next((speed for part, speed in RATED_TFLOPS.items() if part in name), None)
    return found | ({"rated_floor_seconds": flops / (rated * 1e12)} if rated else {})


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _synchronize() -> None:
    import torch

    if _device() == "cuda":
        torch.cuda.synchronize()


def _peak() -> float:
    """Peak memory of this process in GiB: of the GPU if there is one, else of the machine."""
    import torch

    if _device() == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _ours(shape: Shape, steps: int, side: str) -> dict[str, Any]:
    from tests.benchmarks.ours import Ours, one_worker, steps_of

    shape.model(_device())  # only for its memory, because `Ours` computes the reference as soon as it is made
    before = _peak()
    with one_worker() as mesh:
        method, _, compiled = side.partition("-")
        ours = Ours(shape, mesh, steps_of(shape, steps), method, compiled=bool(compiled) or None)
        seconds = []
        for number in range(steps):
            _await_turn()
            seconds.append(ours.step(number))
    limits = floor(shape, shape.pairs(shape.step_pairs * steps))
    return {"seconds": seconds, "above_model_gib": _peak() - before} | limits


def _official(shape: Shape, steps: int, _: str) -> dict[str, Any]:
    """A step as the official trainer takes it: all logits and all layers' states of policy and reference over padded
    sequences, then POT for one pair after the other over the whole padded matrix.
    """
    import ot
    import torch
    from transformers import LlamaForCausalLM

    from otpo.data.collate import collate_pairs, padded
    from otpo.records import TokenPair

    pairs, of_a_step = shape.pairs(shape.step_pairs * steps), shape.step_pairs
    items = [TokenPair(i, p, [*c, 1], [*r, 1]) for i, (p, c, r) in enumerate(pairs)]
    torch.manual_seed(0)
    policy, reference = LlamaForCausalLM(shape.config()), LlamaForCausalLM(shape.config()).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-5)
    before, seconds = _peak(), []

    def forward(model, ids, attention):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(ids, attention_mask=attention, output_hidden_states=True, use_cache=False)
        return out.logits[:, :-1].float().log_softmax(-1), out.hidden_states[-1][:, :-1].detach().float()

    def plan(p, q, mask_p, mask_q):
        cost = torch.cdist(p * mask_p[:, None], q * mask_q[:, None]) + 1e-6
        cost = cost / cost.max() if cost.max() > 1 else cost
        return ot.unbalanced.sinkhorn_unbalanced(
            mask_p.float(), mask_q.float(), cost, 0.1, 0.2, reg_type="entropy", method="sinkhorn_stabilized"
        )

    for start in range(0, len(items), of_a_step):
        batch = collate_pairs(items[start : start + of_a_step])
        ids, attention, positions = padded(batch)
        mask = torch.zeros(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)
        for sequence in range(len(ids)):
            mask[sequence, positions[sequence][batch.mask[sequence]]] = True
        _await_turn()
        began = time.perf_counter()
        logits, states = forward(policy, ids, attention)
        with torch.no_grad():
            frozen, _ = forward(reference, ids, attention)
        weights = torch.zeros(mask.shape)
        for pair in range(of_a_step):
            other = pair + of_a_step
            transported = plan(states[pair], states[other], mask[pair], mask[other])
            scale = transported.sum() / min(mask[pair].sum(), mask[other].sum())
            weights[pair], weights[other] = transported.sum(1) / scale, transported.sum(0) / scale
        ratio = ((logits - frozen).gather(-1, ids[:, 1:, None])[..., 0] * weights).sum(-1)
        loss = -torch.nn.functional.logsigmoid(0.1 * (ratio[:of_a_step] - ratio[of_a_step:])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "above_model_gib": _peak() - before}


def _trl(shape: Shape, steps: int, side: str) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    pairs = shape.pairs(shape.step_pairs * steps)
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2} | {f"w{i}": i for i in range(3, shape.vocab)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>")

    def text(ids: list[int]) -> str:
        return " ".join(f"w{i}" for i in ids)

    rows = [{"prompt": text(p), "chosen": " " + text(c), "rejected": " " + text(r)} for p, c, r in pairs]
    model = shape.model(_device())
    before = _peak()
    ticks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            _await_turn()
            _synchronize()
            ticks.append(time.perf_counter())

        def on_step_end(self, *_: object, **__: object) -> None:
            _synchronize()
            ticks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        options = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=min(PAIRS, shape.step_pairs),
            gradient_accumulation_steps=max(1, shape.step_pairs // PAIRS),
            max_steps=steps,
            train_sampling_strategy="sequential",
            learning_rate=1e-5,
            max_length=4096,
            report_to=[],
            save_strategy="no",
            gradient_checkpointing=shape.checkpointing,
            bf16=True,
            use_cpu=_device() == "cpu",
            use_liger_kernel=side == "trl-liger",
            precompute_ref_log_probs=side != "trl-as-installed",
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            model=model,
            ref_model=copy.deepcopy(model) if side == "trl-as-installed" and not shape.lora else None,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA) if shape.lora else None,
            args=options,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    seconds = [end - begin for begin, end in zip(ticks[::2], ticks[1::2], strict=True)]
    return {"seconds": seconds, "above_model_gib": _peak() - before}
