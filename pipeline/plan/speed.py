"""How long a step takes, from floating-point operations and bytes between workers. FLOP is an operation."""

from __future__ import annotations

import math

from pipeline.plan.lengths import Lengths
from pipeline.plan.machine import Gpu, Machine
from pipeline.plan.memory import Load
from pipeline.plan.shape import Shape

REACHED = 0.5  # share of a link's bandwidth that collectives reach, and of a GPU's memory bandwidth in generation
SEQUENCES = 256  # that an engine of vLLM generates at once, where its cache holds them


def forward_flops(shape: Shape, lengths: Lengths) -> tuple[float, float]:
    """FLOP of a row's forward pass: of the decoder, and of the head, which only completions meet.

    Two for each weight and token; attention adds 4 for each pair of tokens that see each other and each of the
    queries' dimensions.
    """
    tokens = lengths.row(shared=shape.shares_prompts)
    attention = 4 * shape.queries * shape.layers * lengths.completions * lengths.square / 2
    return 2 * shape.active * tokens + attention, 2 * shape.head * lengths.completion * lengths.completions


def model_flops(shape: Shape, lengths: Lengths, *, adapters: bool) -> float:
    """FLOP of a row's forward and backward pass without repeated ones, as MFU counts them.

    The backward pass costs twice the forward pass; beside adapters frozen weights need no gradient, and it costs once.
    """
    return sum(forward_flops(shape, lengths)) * (2 if adapters else 3)


def step_seconds(
    shape: Shape, load: Load, lengths: Lengths, machine: Machine, rows: int, *, hybrid: bool = False
) -> tuple[float, float]:
    """Seconds of an optimizer step on GPUs: while it computes, and while it moves weights and gradients.

    Both happen at the same time, so a step takes the longer of the two. It computes until the GPU with most rows is
    done. Each micro-batch gathers the weights for each forward and for the backward pass, and reduces gradients in
    float32. Between nodes, NCCL's rings use the adapters of all GPUs of a node side by side.

    Args:
        rows: of the global batch.
        hybrid: weights are gathered within a node; nodes add up their gradients once a step, each GPU its shard.
    """
    gpu = _gpu(machine)
    flops = model_flops(shape, lengths, adapters=load.adapters)
    flops += forward_flops(shape, lengths)[0] if load.checkpointing else 0
    flops += (load.live_reference + load.first_pass) * sum(forward_flops(shape, lengths))
    computing = math.ceil(rows / machine.ranks) * flops / (gpu.peak(load.dtype_bytes) * machine.utilisation)
    if machine.ranks == 1:
        return computing, 0.0
    gradients = 4 * (shape.adapters if load.adapters else shape.parameters)
    gathers = 2 + load.first_pass
    moved = load.micro_batches * (gathers * load.dtype_bytes * shape.parameters + gradients)
    if hybrid:  # an all-reduce moves each byte twice
        between = 2 * gradients / machine.per_node / machine.network
        return computing, (moved / gpu.links + between) / REACHED
    link = gpu.links if machine.nodes == 1 else min(machine.network * machine.per_node, gpu.links)
    return computing, moved / (REACHED * link)


def frozen_seconds(shape: Shape, lengths: Lengths, machine: Machine, dtype_bytes: int) -> float:
    """Seconds in which GPUs compute a frozen model's log-probabilities of all rows, once."""
    flops = lengths.rows * sum(forward_flops(shape, lengths))
    return flops / (machine.ranks * _gpu(machine).peak(dtype_bytes) * machine.utilisation)


def engine_memory(shape: Shape, gpu: Gpu, *, size: int, utilization: float) -> tuple[int, int]:
    """Bytes on each GPU of an engine: the model's weights in bf16, and what is left for its cache; below 0: no fit.

    Args:
        size: `generate.tensor_parallel_size`. utilization: `generate.gpu_memory_utilization`.
    """
    weights = 2 * shape.parameters // size
    return weights, int(utilization * gpu.memory) - weights - 2 * 2**30  # 2 GiB: activations, CUDA graphs


def engine_tokens_per_second(shape: Shape, gpu: Gpu, *, size: int, utilization: float, context: float) -> float:
    """Tokens a second of one engine: each token of all sequences reads the weights and the caches once.

    Args:
        context: mean tokens of a sequence while it is generated.
    """
    weights, cache = engine_memory(shape, gpu, size=size, utilization=utilization)
    sequence = 2 * shape.cached * shape.layers * context / size
    sequences = max(1, min(SEQUENCES, int(max(cache, 0) / sequence)))
    return sequences / ((weights + sequences * sequence) / (REACHED * gpu.bandwidth))


def _gpu(machine: Machine) -> Gpu:
    assert machine.gpu is not None, "time is planned for GPUs only"
    return machine.gpu
