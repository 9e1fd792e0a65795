"""Peak memory of one training worker, by part.

The peak is in the backward pass of the last micro-batch, beside optimizer states. Where there are several, the
gradients of earlier ones lie beside all activations; those of a single one grow while its activations are given back.
`otpo.models.sharding` and `otpo.kernels.mixed_precision` are what is described; B is bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from otpo.kernels.logprobs import CHUNK_LOGITS, KEPT_CHUNKS
from otpo.training.optimizer import ADAMW, STATE_BYTES
from pipeline.plan.machine import GIB
from pipeline.plan.shape import Shape

MASTER = 4  # B of a trained weight, and of its gradient
CONTEXT = {"cuda": 3 * GIB // 2, "cpu": GIB // 2}  # CUDA's context and NCCL's buffers; libraries in a process
SLACK = 0.05  # of what is allocated, that lies unused between blocks


@dataclass(frozen=True)
class Load:
    """What a worker holds and computes at a time.

    Attributes:
        dtype_bytes: of a number in the precision of the computation.
        adapters: only adapters are trained.
        four_bit: the weights beside them have 4 bits.
        live_reference: a second, frozen model stands beside the policy.
        first_pass: the global batch goes through the model once more, without gradients, before the step.
        states: hidden states are kept in float32 for token weights.
        tokens: that the model computes in the largest micro-batch.
        sequence_tokens: of its sequences, each with its prompt.
        completion_tokens: of them, those that meet the vocabulary.
        micro_batches: of a worker in a step.
        checkpointing: activations are computed again in the backward pass.
        compiled: layers and the kernels over the vocabulary are (`otpo.models.compiled`).
        state_bytes: of the optimizer's states, for each trained weight.
        pair_tokens: of both completions of the longest pair, to which the others are padded for token weights.
    """

    dtype_bytes: int
    adapters: bool
    four_bit: bool
    live_reference: bool
    states: bool
    tokens: int
    sequence_tokens: int
    completion_tokens: int
    micro_batches: int
    checkpointing: bool
    compiled: bool = False
    state_bytes: float = STATE_BYTES[ADAMW]
    pair_tokens: int = 0
    first_pass: bool = False


def memory_parts(shape: Shape, load: Load, ranks: int, device: str = "cuda") -> dict[str, int]:
    """Bytes of a worker at the peak, by part.

    Args:
        ranks: training workers, over which everything is sharded.
        device: "cuda" or "cpu".
    """
    trained = shape.adapters if load.adapters else shape.parameters
    kept, weighing = activations(shape, load), transport(shape, load, device)
    # a CPU keeps the memory of its gradients
    beyond = MASTER * trained // ranks if device == "cuda" and load.micro_batches == 1 else 0
    parts = {
        "weights": _weights(shape, load, ranks),
        "gradients": MASTER * trained // ranks,
        "optimizer": int(load.state_bytes * trained) // ranks,
        "gathered layers": _gathered(shape, load, ranks),
        "activations": max(0, kept - beyond),
        "logits": _logits(shape, load, CHUNK_LOGITS[device]),
    }
    if load.states:
        parts["token weights"] = max(0, weighing - max(0, beyond - kept))
    if ranks > 1 and load.micro_batches > 1 and device == "cpu":
        # GPUs reduce the gradients of each micro-batch; CPUs those of a step, and keep them unsharded until then
        parts["gradients between micro-batches"] = MASTER * trained
    if load.live_reference and not load.adapters:
        parts["reference"] = MASTER * shape.parameters // ranks + load.dtype_bytes * shape.root
    if device == "cuda":
        parts["unused blocks"] = int(SLACK * sum(parts.values()))
    parts["CUDA and NCCL" if device == "cuda" else "libraries"] = CONTEXT[device]
    return parts


def _weights(shape: Shape, load: Load, ranks: int) -> int:
    """Trained weights in float32; frozen ones as they were saved, or in 4 bits, which are not sharded."""
    if not load.adapters:
        return MASTER * shape.parameters // ranks
    if not load.four_bit:
        return (shape.saved_bytes * shape.parameters + MASTER * shape.adapters) // ranks
    others = shape.parameters - shape.linear
    # half a byte, and for each 64 of them a scale of a byte, itself scaled by blocks of 256
    quantised = int(shape.linear * (0.5 + 1 / 64 + 4 / (64 * 256)))
    return quantised + (shape.saved_bytes * others + MASTER * shape.adapters) // ranks


def _gathered(shape: Shape, load: Load, ranks: int) -> int:
    """Copies of weights in the precision of the computation, and gradients on their way.

    Several workers gather the root and two layers, and hold the gradients of one part whole until they are reduced in
    float32. One worker keeps a copy of every weight whose precision differs.
    """
    low, largest = load.dtype_bytes, max(shape.layer, shape.head)
    if ranks == 1:
        saved = shape.saved_bytes if load.adapters else MASTER
        copies = 0 if low == saved else low * (shape.parameters - (shape.linear if load.four_bit else 0))
        return copies + (0 if load.adapters else MASTER * shape.head)
    on_their_way = 0 if load.adapters else (low + MASTER) * largest
    layer = 0 if load.four_bit else 2 * low * shape.layer
    return low * shape.root + layer + on_their_way


def token_activations(shape: Shape, load: Load) -> tuple[float, float]:
    """B that a layer keeps for backward: for each token, and for each token of a sequence with its prompt.

    Norms compute in float32 and keep their input in it, their result before and after the scale in the computation's
    precision. Attention keeps queries, keys, values and its result for each sequence, and the result in the flat
    layout. The feed-forward part keeps its products with the gate, the activation and what goes into the last product;
    each expert that a token is sent to, a copy of its state and a result before it is weighed.
    A compiled layer keeps a norm's input and result in the computation's precision, and computes the activation again,
    but for experts, which are not compiled.
    """
    low = load.dtype_bytes
    norms = 2 * (2 * low if load.compiled else 4 + 2 * low) * shape.hidden
    if shape.query_norms:
        norms += (4 + low) * (shape.queries + shape.keys)
    attention = low * (2 * shape.queries + 2 * shape.keys) + 4 * shape.heads
    middle = (4 if shape.gated else 2) - (load.compiled and not shape.routed)
    copies = 2 * shape.routed * shape.hidden
    return norms + low * (shape.queries + middle * shape.middle + copies), attention


def activations(shape: Shape, load: Load) -> int:
    """B kept for backward by all layers, and the states after the last norm that the head and token weights read."""
    per_token, per_sequence = token_activations(shape, load)
    layer = per_token * load.tokens + per_sequence * load.sequence_tokens
    if load.checkpointing:
        kept = load.dtype_bytes * shape.hidden * load.tokens * shape.layers + layer
    else:
        kept = layer * shape.layers
    ends = (4 + 3 * load.dtype_bytes) * shape.hidden * load.tokens
    ends += (2 * load.dtype_bytes + (4 if load.states else 0)) * shape.hidden * load.completion_tokens
    return int(kept + ends)


def transport(shape: Shape, load: Load, device: str) -> int:
    """B of `otpo.methods.weights.transport` in float64, beside all activations: the largest of its three moments.

    Distances need two copies of the states and a matrix of a pair's tokens; their offset and mask one copy, three
    matrices and a mask of a byte. At the end of the solver there are the mask, costs, kernel, its exponential (which a
    GPU keeps in float32), and two sums. `solver: pot` takes less.
    """
    if not load.states:
        return 0
    states = 8 * shape.hidden * load.completion_tokens
    cells = load.completion_tokens * load.pair_tokens // 4  # most where both completions are of one length
    solver = 1 + 8 * 5 if device == "cpu" else 1 + 8 * 4 + 4
    return max(2 * states + 8 * cells, states + 25 * cells, solver * cells)


def _logits(shape: Shape, load: Load, chunk: int) -> int:
    """The chunks of logits that are kept, and three float32 ones while one is worked on, unless that is compiled."""
    whole = load.completion_tokens * shape.vocabulary
    working = 0 if load.compiled else 3 * 4 * min(whole, chunk)
    return load.dtype_bytes * min(whole, KEPT_CHUNKS * chunk) + working
