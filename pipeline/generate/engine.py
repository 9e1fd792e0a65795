"""How prompts become outputs: settings, and the way from a prompt to token ids and from token ids to an output.

An engine stays loaded and changes from one model to another of the same architecture by reloading the weights in
place: on a CPU that takes hundredths of a second where a new engine takes half a minute. Prompts become token ids here
and not in vLLM, so that no chat template or BOS is applied twice and every engine sees the same tokens. Importing this
module loads neither torch nor vLLM.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from otpo.data.encoder import encode_prompt
from otpo.data.template import Rendering
from otpo.errors import UserError
from pipeline.generate.model_folder import ModelFolder, tokenizer_of


@dataclass(frozen=True)
class Sampling:
    """How outputs are drawn.

    The default is greedy decoding: the outputs are then a property of the model alone. AlpacaEval leaves decoding to
    each entry; temperature 0.7 with top_p 1.0 is common among them.

    Attributes:
        temperature: 0 is greedy; vLLM takes no more than 2.
        top_p: nucleus mass.
        max_tokens: most tokens of an output, its end token included.
        n: outputs for each prompt; more than one needs a temperature.
        seed: every output has its own seed made of this, the prompt's id and the number of the sample, so that outputs
            do not depend on batches or on the number of workers.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 1024
    n: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, right, wanted in (
            ("temperature", 0 <= self.temperature <= 2, "in [0, 2]"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("n", self.n >= 1, "at least 1"),
        ):
            if not right:
                raise UserError(f"sampling: {name} must be {wanted}, found {getattr(self, name)}")
        if self.n > 1 and self.temperature == 0:
            raise UserError(f"sampling: {self.n} greedy outputs would all be equal: set a temperature above 0, or n=1")


@dataclass(frozen=True)
class EngineConfig:
    """What an engine is and how many of them there are.

    Attributes:
        backend: "auto" is vLLM where it is installed, else transformers.
        device: "auto" is the GPU where there is one.
        dtype: "auto" is bf16 on a GPU and fp32 on a CPU.
        max_model_len: tokens of prompt and output together; None is the model's own limit, at most 4,096.
        workers: engines. On a GPU each takes `tensor_parallel_size` of them.
        gpu_memory_utilization: the share of a GPU that vLLM may fill.
        batch_size: most outputs asked of an engine in one call. They come back one by one, as they are finished.
        start_timeout: seconds an engine may take to be scheduled and loaded.
    """

    backend: Literal["auto", "vllm", "transformers"] = "auto"
    device: Literal["auto", "cpu", "gpu"] = "auto"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    max_model_len: int | None = None
    workers: int = 1
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9
    batch_size: int = 4096
    start_timeout: float = 900.0

    def __post_init__(self) -> None:
        for name in ("workers", "tensor_parallel_size"):
            if getattr(self, name) < 1:
                raise UserError(f"generate.{name} must be at least 1, found {getattr(self, name)}")


@dataclass(frozen=True)
class Request:
    """One output to be generated; `prompt` is text, or messages for the chat template, with tools and variables."""

    id: str
    sample: int
    prompt: str | list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Output:
    """What a model generated for a request.

    Attributes:
        n_tokens: generated tokens, the end token included.
        truncated: cut at `max_tokens`, without an end.
        error: why there is no output, or None.
        seconds: this output's share of the engine's time.
    """

    id: str
    sample: int
    output: str
    n_tokens: int = 0
    truncated: bool = False
    error: str | None = None
    seconds: float = 0.0


class Engine(Protocol):
    """What an engine can do (`pipeline.generate.backends`)."""

    def load(self, model: ModelFolder) -> None:
        """Put the weights of a model of the same architecture in place of the present ones."""

    def complete(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, stops: list[int]
    ) -> Iterator[list[tuple[int, list[int]]]]:
        """The outputs that each step finishes, often none: a prompt's position and the token ids of its output.

        The stop token is included where the output ends in one. Whoever stops asking ends the other outputs.
        """


def generate_outputs(
    engine: Engine, model: ModelFolder, requests: Sequence[Request], sampling: Sampling, template: Rendering, limit: int
) -> Iterator[list[Output]]:
    """Generate an output for each request.

    Args:
        engine: holds a model of the same architecture.
        model: whose weights are put into the engine first, if they are not there.
        requests: in any order.
        sampling: how outputs are drawn; its `n` is not looked at.
        template: how prompts are rendered.
        limit: tokens of prompt and output together. A prompt that leaves fewer than `sampling.max_tokens` of them is
            not cut: it gets an empty output and an error, for a cut prompt is another question.

    Yields:
        Outputs as they are finished, in any order; none where an engine's step has finished none.

    Raises:
        UserError: the tokenizer lacks what is needed, or a prompt does not fit the template.
    """
    engine.load(model)
    began = time.perf_counter()
    tokenizer = tokenizer_of(model)
    stops = stop_tokens(model, tokenizer)
    encoded = [encode_prompt(tokenizer, r.prompt, template, r.tools, r.template_kwargs) for r in requests]
    room = limit - sampling.max_tokens
    yield [
        Output(
            request.id,
            request.sample,
            "",
            error=f"the prompt has {len(ids)} tokens, more than the {room} that max_model_len {limit} less max_tokens"
            f" {sampling.max_tokens} leaves",
        )
        for request, ids in zip(requests, encoded, strict=True)
        if len(ids) > room
    ]
    fit = [i for i, ids in enumerate(encoded) if len(ids) <= room]
    seeds = [request_seed(sampling.seed, requests[i].id, requests[i].sample) for i in fit]
    for some in engine.complete([encoded[i] for i in fit], seeds, sampling, stops):
        outputs = []
        if some:
            share, began = (time.perf_counter() - began) / len(some), time.perf_counter()
        for position, ids in some:
            request = requests[fit[position]]
            text = tokenizer.decode([t for t in ids if t not in stops], skip_special_tokens=True)
            cut = not (ids and ids[-1] in stops)
            outputs.append(Output(request.id, request.sample, text, len(ids), cut, None, share))
        yield outputs


def request_seed(seed: int, prompt_id: str, sample: int) -> int:
    """The 31-bit seed of one output."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{prompt_id}\0{sample}".encode()).digest()[:4], "big") >> 1


def stop_tokens(model: ModelFolder, tokenizer: Any) -> list[int]:
    """The tokens that end an output: the tokenizer's EOS and those of the generation config (else of the config)."""
    declared = model.generation_config.get("eos_token_id", model.config.get("eos_token_id"))
    declared = declared if isinstance(declared, list) else [declared]
    return sorted({token for token in (tokenizer.eos_token_id, *declared) if token is not None})
