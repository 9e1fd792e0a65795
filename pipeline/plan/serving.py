"""What generation and judging take: memory and time of the engines, calls and price of the judge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from eval.judge.protocols.registry import find_protocol
from pipeline.plan.machine import Machine
from pipeline.plan.shape import Shape
from pipeline.plan.speed import engine_memory, engine_tokens_per_second
from pipeline.recipe import Recipe

PROMPTS = {"alpaca_eval": 805}  # rows of known tasks; others are counted, or assumed to have as many
MEAN_OUTPUT = 400  # tokens
MEAN_PROMPT = 100  # tokens
JUDGE_PROMPT = 300  # tokens of a judge's instructions


@dataclass(frozen=True)
class Serving:
    """What follows training.

    Attributes:
        engines: how many; each has `gpus`, all of one node. 0 where no node has as many.
        weights, cache: bytes on each GPU of an engine; the cache is below 0 where the weights alone do not fit.
        fitting: fewest GPUs of an engine, a power of two and of one node, that hold the weights and a cache as large;
            None where a node has too few.
        outputs: of all models for all tasks, and of sampled pairs.
        hours: of generation.
        calls: of the judge, and of the scorer of sampled pairs, at an address; a reward model's are not counted.
        usd: by the recipe's prices; 0 where it names none.
        assumptions: what the figures rest on.
    """

    engines: int
    gpus: int
    weights: int
    cache: int
    fitting: int | None
    outputs: int
    hours: float
    calls: int
    usd: float
    assumptions: tuple[str, ...]


def serving(recipe: Recipe, shape: Shape, machine: Machine) -> Serving | None:
    """Plan the generation of a recipe on its machine's GPUs; None where nothing is generated, and on CPUs."""
    if machine.gpu is None or not (recipe.generate.tasks or recipe.pairs):
        return None
    generate, gpu = recipe.generate, machine.gpu
    size, share = generate.tensor_parallel_size, generate.gpu_memory_utilization
    weights, cache = engine_memory(shape, gpu, size=size, utilization=share)
    counts = [_prompts(source, generate.limit) for source in generate.named_tasks().values()]
    evaluated = sum(counts) * len(recipe.labels())
    sampled = _prompts(recipe.pairs.prompts, recipe.pairs.limit) * recipe.pairs.n if recipe.pairs else 0
    length = min(MEAN_OUTPUT, generate.max_tokens)
    tokens = evaluated * length + sampled * min(MEAN_OUTPUT, recipe.pairs.max_tokens if recipe.pairs else 0)
    engines = min(generate.workers, machine.nodes * (machine.per_node // size))
    rate = engine_tokens_per_second(shape, gpu, size=size, utilization=share, context=MEAN_PROMPT + length / 2)
    judged = _calls(recipe, sum(counts))
    asked = MEAN_PROMPT + 2 * length + JUDGE_PROMPT
    judge = recipe.judge
    usd = judged * (asked * judge.price_input + (judge.max_tokens or 1) * judge.price_output) / 1e6
    scored = 0
    if recipe.pairs and not recipe.pairs.scorer.reward_model:
        scored, scorer = sampled, recipe.pairs.scorer
        reply = scorer.max_tokens or 16
        usd += scored * ((asked - length) * scorer.price_input + reply * scorer.price_output) / 1e6
    return Serving(
        engines=engines,
        gpus=size,
        weights=weights,
        cache=cache,
        fitting=next(
            (
                2**k
                for k in range(machine.per_node.bit_length())
                if 4 * shape.parameters / 2**k < share * gpu.memory and shape.heads % 2**k == 0
            ),
            None,
        ),
        outputs=evaluated + sampled,
        hours=tokens / (rate * engines) / 3600 if engines else 0.0,
        calls=judged + scored,
        usd=usd,
        assumptions=(
            f"generation: {length} tokens an output on average, half of {gpu.bandwidth / 1e12:.3g} TB/s of memory",
            f"judge: {asked:,} tokens a call",
        ),
    )


def _prompts(source: str, limit: int | None) -> int:
    """Prompts of a task: those of a local JSON-lines file are counted."""
    path = Path(source).expanduser()
    count = PROMPTS.get(source, PROMPTS["alpaca_eval"])
    if path.suffix == ".jsonl" and path.is_file():
        with path.open("rb") as file:
            count = sum(1 for line in file if line.strip())
    return min(count, limit or count)


def _calls(recipe: Recipe, prompts: int) -> int:
    """Verdicts that a judge at an address is asked for: each model against the reference, and against each other."""
    if recipe.judge.reward_model or not recipe.judge.url:
        return 0
    trained = len(recipe.labels()) - 1
    against_reference = trained if recipe.judge.reference == "base" else trained + 1
    each_other = math.comb(trained, 2) if recipe.judge.each_other else 0
    protocol = find_protocol(recipe.judge.protocol)
    if protocol.single:  # each model's outputs once, and the reference's
        return prompts * (trained + 1 if recipe.judge.reference == "base" else trained + 2)
    return prompts * (against_reference + each_other) * (2 if recipe.judge.both_orders or protocol.both_orders else 1)
