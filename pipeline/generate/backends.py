"""The two engines: vLLM's public `LLM` class, and transformers where vLLM cannot be installed.

An engine takes token ids and gives token ids. It is built from a config without "auto" and owns its process: it sets
environment variables and thread counts. Importing this module loads neither torch nor vLLM.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any

from otpo.dtypes import TORCH_NAMES, torch_dtype
from otpo.errors import UserError
from pipeline.generate.engine import EngineConfig, Sampling
from pipeline.generate.model_folder import ModelFolder, why_not_vllm

# Set before the engine's process imports torch or vLLM. Without multiprocessing vLLM runs inside the process: a killed
# parent leaves no engine behind, and on a CPU the engine starts in half the time. With tensor parallelism the workers
# are processes that watch a pipe to this one and end with it.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
# Waiting threads must sleep: spinning ones made generation ten times slower when another process wanted the cores.
CPU_ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "PASSIVE"}

log = logging.getLogger(__name__)


def resolve(config: EngineConfig, model: ModelFolder) -> EngineConfig:
    """The config without "auto", for an engine that is to serve a model."""
    device = device_of(config)
    dtype = config.dtype if config.dtype != "auto" else {"cpu": "fp32", "gpu": "bf16"}[device]
    return replace(config, backend=backend_of(config, model), device=device, dtype=dtype)  # type: ignore[arg-type]


def device_of(config: EngineConfig) -> str:
    """The GPU where the cluster has one. The driver's machine need not: before it is connected, an address will do."""
    if config.device != "auto":
        return config.device
    import ray

    if ray.is_initialized():
        return "gpu" if ray.cluster_resources().get("GPU", 0) else "cpu"
    import torch

    return "gpu" if os.environ.get("RAY_ADDRESS") or torch.cuda.is_available() else "cpu"


def backend_of(config: EngineConfig, model: ModelFolder) -> str:
    """The backend that the config names; for "auto", vLLM where it is installed and can serve the model.

    Raises:
        UserError: the config names vLLM, which is not installed or cannot serve the model.
    """
    there = find_spec("vllm") is not None
    if config.backend == "vllm" and not there:
        raise UserError(
            "generate.backend is vllm, and vLLM is not installed here: install it, or set generate.backend=auto."
        )
    if config.backend == "auto" and not there:
        _say_once("vLLM is not installed: transformers generates the outputs, which is slower.")
    if config.backend == "transformers" or not there:
        return "transformers"
    reason = why_not_vllm(model, on_cpu=device_of(config) == "cpu")
    if reason is None:
        return "vllm"
    if config.backend == "vllm":
        raise UserError(f"{model.name}: {reason}. Set generate.backend=auto, and transformers generates the outputs.")
    _say_once(f"{model.name}: {reason}. transformers generates the outputs, which is slower.")
    return "transformers"


@cache
def _say_once(message: str) -> None:
    log.warning(message)


def environment(config: EngineConfig, threads: int | None) -> dict[str, str]:
    """Environment variables of an engine's process; `threads` on the CPU, None leaves their number to the libraries."""
    count = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return {**ENVIRONMENT, **(CPU_ENVIRONMENT if config.device == "cpu" else {}), **count}


def start(config: EngineConfig, model: ModelFolder) -> VLLMEngine | TransformersEngine:
    """Load the engine that a config without "auto" names."""
    return VLLMEngine(config, model) if config.backend == "vllm" else TransformersEngine(config, model)


class VLLMEngine:
    """vLLM's `LLM`, its core inside this very process, so that it cannot outlive it."""

    def __init__(self, config: EngineConfig, model: ModelFolder) -> None:
        os.environ |= environment(config, None)
        import vllm

        limit = model.context(config.max_model_len)
        settings: dict[str, Any] = (
            cpu_settings(model, limit, config.dtype)
            if config.device == "cpu"
            else {"gpu_memory_utilization": config.gpu_memory_utilization}
        )
        if config.tensor_parallel_size > 1:
            settings |= {"tensor_parallel_size": config.tensor_parallel_size, "distributed_executor_backend": "mp"}
        self.llm = vllm.LLM(
            model=str(model.path),
            skip_tokenizer_init=True,  # it sees token ids only: checkpoints may differ in their tokenizer
            generation_config="vllm",  # no sampling setting comes silently from the model's folder
            dtype=TORCH_NAMES[config.dtype],  # type: ignore[arg-type]
            max_model_len=limit,
            seed=0,
            use_tqdm_on_load=False,
            **settings,
        )
        self.model = model

    def load(self, model: ModelFolder) -> None:
        """Put the weights of a model of the same architecture in place of the present ones."""
        if model.digest == self.model.digest:
            return
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(model.path)})
        self.llm.apply_model(_repack_embeddings)
        self.llm.reset_prefix_cache()
        self.model = model

    def complete(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, stops: list[int]
    ) -> Iterator[list[tuple[int, list[int]]]]:
        """The outputs that each step finishes, often none: a prompt's position and the token ids of its output."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        engine, names = self.llm.llm_engine, []
        try:
            for number, (ids, seed) in enumerate(zip(prompts, seeds, strict=True)):
                settings = SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_tokens,
                    seed=seed if sampling.temperature else None,
                    stop_token_ids=stops,
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                names.append(engine.add_request(str(number), TokensPrompt(prompt_token_ids=ids), settings))
            while engine.has_unfinished_requests():
                finished: list[Any] = [output for output in engine.step() if output.finished]
                yield [(int(output.request_id), list(output.outputs[0].token_ids)) for output in finished]
        finally:  # the next call must not find what this one left, after an error or where nobody asks any more
            engine.abort_request(names, internal=True)


def _repack_embeddings(model: Any) -> None:
    """Pack embeddings for the CPU again: vLLM 0.32 reloads weights without renewing the packed copy of a tied head."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding):
            module.quant_method.process_weights_after_loading(module)


class TransformersEngine:
    """`generate` of transformers: slower, runs wherever torch does; vLLM's outputs are tested against it."""

    def __init__(self, config: EngineConfig, model: ModelFolder) -> None:
        self.device = "cuda" if config.device == "gpu" else "cpu"
        self.dtype = torch_dtype(config.dtype)
        self.batch_size = 32
        self.model: ModelFolder | None = None
        self.load(model)

    def load(self, model: ModelFolder) -> None:
        """Put the weights of a model of the same architecture in place of the present ones."""
        if self.model is not None and model.digest == self.model.digest:
            return
        from transformers import AutoModelForCausalLM, GenerationConfig

        from otpo.models.disk.architecture import is_multimodal, read_config
        from otpo.models.disk.text_model import load_text_model

        network: Any = (
            load_text_model(model.path)
            if is_multimodal(read_config(model.path))
            else AutoModelForCausalLM.from_pretrained(model.path, dtype=self.dtype)
        )
        self.network = network.to(self.device, self.dtype).eval()
        self.network.generation_config = GenerationConfig()
        self.model = model

    def complete(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, stops: list[int]
    ) -> Iterator[list[tuple[int, list[int]]]]:
        """The outputs that each step finishes, often none: a prompt's position and the token ids of its output."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths together: little padding
        for start_ in range(0, len(order), self.batch_size):
            chosen = order[start_ : start_ + self.batch_size]
            batch = self._batch([prompts[i] for i in chosen], [seeds[i] for i in chosen], sampling, stops)
            yield list(zip(chosen, batch, strict=True))

    def _batch(
        self, prompts: list[list[int]], seeds: list[int], sampling: Sampling, stops: list[int]
    ) -> list[list[int]]:
        import torch
        from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

        length = max(map(len, prompts))
        pad = stops[0] if stops else 0
        ids = torch.tensor([[pad] * (length - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        processors = LogitsProcessorList()
        if sampling.temperature:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_p < 1:
                processors.append(TopPLogitsWarper(sampling.top_p))
            processors.append(_SeededGumbel(seeds))  # type: ignore[arg-type]
        settings = GenerationConfig(
            max_new_tokens=sampling.max_tokens, do_sample=False, eos_token_id=stops or None, pad_token_id=pad
        )
        with torch.inference_mode():
            out = self.network.generate(
                ids, attention_mask=mask, generation_config=settings, logits_processor=processors
            )
        return [_until_stop(row, stops) for row in out[:, length:].tolist()]


class _SeededGumbel:
    """Adds Gumbel noise from a generator for each row: its argmax is a sample that does not depend on the batch."""

    def __init__(self, seeds: list[int]) -> None:
        import torch

        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        uniform = torch.stack([torch.rand(scores.shape[-1], generator=g, dtype=torch.float64) for g in self.generators])
        return scores - torch.log(-torch.log(uniform.clamp_min(1e-300))).to(scores)


def _until_stop(ids: list[int], stops: list[int]) -> list[int]:
    for i, token in enumerate(ids):
        if token in stops:
            return ids[: i + 1]
    return ids


def cpu_settings(model: ModelFolder, limit: int, dtype: str) -> dict[str, Any]:
    """Arguments of vLLM on a CPU, by their names in Python, for sequences of at most `limit` tokens."""
    token = 2 * model.layers * model.kv_heads * model.head_dim * {"fp32": 4, "bf16": 2}[dtype]
    return {
        "enforce_eager": True,
        # vLLM 0.32 fails on a seeded request whose prompt takes more than one step: it winds back the generator of
        # random numbers, which the CPU's cannot do
        "enable_chunked_prefill": False,
        # room for 256 full sequences, what vLLM runs at once, from 64 MiB to 4 GiB
        "kv_cache_memory_bytes": min(max(256 * limit * token, 64 << 20), 4 << 30),
    }
