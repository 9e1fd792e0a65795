"""What generation and judging take: memory and time of the engines, calls and price of the judge."""

from __future__ import annotations

import math
from dataclasses import dataclass

from eval.judge.panels.members import members_of
from eval.judge.protocols.registry import find_protocol
from pipeline.plan.lengths import prompts_of
from pipeline.plan.machine import Machine
from pipeline.plan.shape import Shape
from pipeline.plan.speed import engine_memory, engine_tokens_per_second
from pipeline.recipe import Recipe

MEAN_OUTPUT = 400  # tokens
MEAN_PROMPT = 100  # tokens
JUDGE_PROMPT = 300  # tokens of a judge's instructions


@dataclass(frozen=True)
class Serving:
    """What follows training.

    Attributes:
        engines: how many; each has `gpus`, all of one node. 0 where no node has as many, or these cannot share it.
        sizes: numbers of GPUs that can.
        weights, cache: bytes on each GPU of an engine; the cache is below 0 where the weights alone do not fit.
        fitting: fewest GPUs of an engine, a power of two and of one node, that hold the weights and a cache as large;
            None where a node has too few.
        outputs: of all models for all tasks, and of sampled pairs.
        hours: of generation.
        calls: of all judges of the panel, and of the scorer of sampled pairs, at an address; a reward model's are not
            counted.
        usd: by the recipe's prices; 0 where it names none.
        assumptions: what the figures rest on.
    """

    engines: int
    gpus: int
    sizes: tuple[int, ...]
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
    counts = [prompts_of(source, generate.limit) for source in generate.named_tasks().values()]
    evaluated = sum(counts) * len(recipe.labels())
    sampled = prompts_of(recipe.pairs.prompts, recipe.pairs.limit) * recipe.pairs.n if recipe.pairs else 0
    length = min(MEAN_OUTPUT, generate.max_tokens)
    tokens = evaluated * length + sampled * min(MEAN_OUTPUT, recipe.pairs.max_tokens if recipe.pairs else 0)
    engines = min(generate.workers, machine.nodes * (machine.per_node // size)) if size in shape.engine_sizes else 0
    rate = engine_tokens_per_second(shape, gpu, size=size, utilization=share, context=MEAN_PROMPT + length / 2)
    protocol, judges = find_protocol(recipe.judge.protocol), members_of(recipe.judge)
    judged = _calls(recipe, sum(counts)) * recipe.judge.samples
    asked = MEAN_PROMPT + (1 if protocol.single else 2) * length + JUDGE_PROMPT
    usd = sum(
        judged * (asked * judge.price_input + (judge.max_tokens or protocol.max_tokens) * judge.price_output) / 1e6
        for judge in judges
    )
    scored = 0
    if recipe.pairs and not recipe.pairs.scorer.reward_model:
        scored, scorer = sampled, recipe.pairs.scorer
        reply = scorer.max_tokens or 16
        usd += scored * ((MEAN_PROMPT + length + JUDGE_PROMPT) * scorer.price_input + reply * scorer.price_output) / 1e6
    return Serving(
        engines=engines,
        gpus=size,
        sizes=shape.engine_sizes,
        weights=weights,
        cache=cache,
        fitting=next(
            (
                2**k
                for k in range(machine.per_node.bit_length())
                if 4 * shape.parameters / 2**k < share * gpu.memory and 2**k in shape.engine_sizes
            ),
            None,
        ),
        outputs=evaluated + sampled,
        hours=tokens / (rate * engines) / 3600 if engines else 0.0,
        calls=judged * len(judges) + scored,
        usd=usd,
        assumptions=(
            f"generation: {length} tokens an output on average, half of {gpu.bandwidth / 1e12:.3g} TB/s of memory",
            f"judge: {asked:,} tokens a call",
        ),
    )


def _calls(recipe: Recipe, prompts: int) -> int:
    """Questions that a judge is sent, not a reward model: each model against the reference, and against each other."""
    if not (recipe.judge.url or recipe.judge.vllm):
        return 0
    trained = len(recipe.labels()) - 1
    against_reference = trained if recipe.judge.reference == "base" else trained + 1
    each_other = math.comb(trained, 2) if recipe.judge.each_other else 0
    protocol = find_protocol(recipe.judge.protocol)
    if protocol.single:  # each model's outputs once, and the reference's
        return prompts * (trained + 1 if recipe.judge.reference == "base" else trained + 2)
    return prompts * (against_reference + each_other) * (2 if recipe.judge.both_orders or protocol.both_orders else 1)
