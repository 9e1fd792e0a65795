"""The engines as Ray actors, and which of them takes the next batch: the first one that is free.

So engines that come late, because their node had to be started, join when they are ready, and faster ones do more.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from dataclasses import asdict, dataclass
from typing import Any

import ray

from otpo.data.template import Rendering
from otpo.errors import UserError
from pipeline.cluster.placement import (
    actor_options,
    beside_judge,
    check_engines,
    engine_threads,
    fewer_engines,
    grows,
    live_nodes,
)
from pipeline.generate.backends import environment, start
from pipeline.generate.engine import EngineConfig, Request, Sampling, generate_outputs
from pipeline.generate.model_folder import ModelFolder, open_model

log = logging.getLogger(__name__)

Call = tuple[ModelFolder, Sampling, Rendering, int]
"""What an engine is asked with each batch: model, sampling, template, tokens of prompt and output together."""


@dataclass(frozen=True)
class StartedEngines:
    """Handles of started engines, as Ray sends them to its tasks.

    Attributes:
        actors: of the engines.
        ready: for each an object that is there once it is loaded.
        turns: who is free; None for a lone engine.
    """

    actors: tuple[Any, ...]
    ready: tuple[Any, ...]
    turns: Any

    def close(self) -> None:
        """End the engines and wait until their processes have let go of memory and GPUs."""
        for actor in (*self.actors, *([self.turns] if self.turns is not None else [])):
            ray.kill(actor)
        for actor in self.actors:
            ray.wait(
                [actor.ready.options(max_task_retries=0).remote()], timeout=30
            )  # resolves, with an error, once the actor is dead

    def up(self) -> int:
        """Engines that have become ready; at least 1, as this is asked where one has worked."""
        return max(1, ray.get(self.turns.count.remote())) if self.turns is not None else 1


def start_engines(
    config: EngineConfig, folder: ModelFolder, *, on_training_nodes: bool, judge_gpus: int
) -> StartedEngines:
    """Start as many of the engines as fit the nodes. Where an autoscaler may add nodes, the others wait for them.

    Args:
        judge_gpus: that a judge holds meanwhile, which vLLM serves.

    Raises:
        UserError: no node has room for one.
    """
    gpus = config.tensor_parallel_size if config.device == "gpu" else 0
    # beside training nothing may wait for GPUs: it would take those that one trial of a sweep leaves to the next
    waiting = on_training_nodes and grows()
    nodes = beside_judge(judge_gpus, live_nodes())
    demands = check_engines(config.workers, gpus, nodes, on_training_nodes=on_training_nodes)
    if fewer := fewer_engines(config.workers, len(demands), waiting=waiting):
        log.warning("%s.", fewer)
    if waiting:  # an engine that waits makes the autoscaler add a node such as the first one's
        demands += [demands[0]] * (config.workers - len(demands))
    # An engine that dies (out of memory, a lost node) is loaded once more and its batch is asked again.
    # `runtime_env` gives a fresh process, so that the environment is set before torch is imported.
    threads = None if gpus else engine_threads(len(demands))  # on a GPU torch chooses
    options: dict[str, Any] = {
        "max_restarts": 1,
        "max_task_retries": 1,
        "runtime_env": {"env_vars": environment(config, threads)},
    }
    actor: Any = ray.remote(_EngineActor)
    actors = [actor.options(**options, **actor_options(gpus, demand)).remote(config, folder) for demand in demands]
    ready = [actor.ready.remote() for actor in actors]
    turns: Any = None
    if len(actors) > 1:
        turns = _Turns.remote()  # type: ignore[attr-defined]
        for number, loaded in enumerate(ready):
            turns.watch.remote(number, [loaded])
    return StartedEngines(tuple(actors), tuple(ready), turns)


def ask(block: dict[str, Any], engines: StartedEngines, call: Call, timeout: float) -> dict[str, list[str]]:
    """Ray Data's task: hand each batch to a free engine and wait for the outputs, or for the failure, as JSON.

    Args:
        block: `batch`, the requests of each batch as JSON.
        timeout: seconds that an engine may take to become ready.
    """
    outputs = []
    for batch in block["batch"]:
        number = 0 if engines.turns is None else ray.get(engines.turns.take.remote(timeout))
        if number < 0:
            outputs.append(json.dumps({"kind": "timeout", "message": ""}))
            continue
        try:
            ray.get(engines.ready[number], timeout=timeout)
            outputs.append(ray.get(engines.actors[number].generate.remote(str(batch), *call)))
        except ray.exceptions.GetTimeoutError:
            outputs.append(json.dumps({"kind": "timeout", "message": ""}))
        except Exception as error:  # the driver reports whatever an engine raises, once
            cause = getattr(error, "cause", error)
            kind = "input" if isinstance(cause, UserError) else "engine"
            outputs.append(json.dumps({"kind": kind, "message": str(cause) or type(cause).__name__}))
        if engines.turns is not None:
            engines.turns.give.remote(number)
    return {"outputs": outputs}


class _EngineActor:
    """One engine in one process."""

    def __init__(self, config: EngineConfig, folder: ModelFolder) -> None:
        self.engine = start(config, _here(folder))

    def ready(self) -> None:
        """Returns once the engine is loaded."""

    def generate(self, batch: str, folder: ModelFolder, sampling: Sampling, template: Rendering, limit: int) -> str:
        """Outputs for a batch of requests, both as JSON."""
        requests = [Request(**values) for values in json.loads(batch)]
        outputs = generate_outputs(self.engine, _here(folder), requests, sampling, template, limit)
        return json.dumps([asdict(output) for output in outputs], ensure_ascii=False)


def _here(folder: ModelFolder) -> ModelFolder:
    """The folder on this node: a hub model is in each node's own cache."""
    return folder if folder.path.is_dir() else open_model(folder.name)


@ray.remote(num_cpus=0)
class _Turns:
    """Knows which engines are ready and free."""

    def __init__(self) -> None:
        self.free: asyncio.Queue[int] = asyncio.Queue()
        self.first = asyncio.Event()
        self.ready = 0

    async def watch(self, engine: int, ready: list[Any]) -> None:
        """Let an engine take batches once `ready`, a list of one object reference, is there.

        An engine that could not be loaded takes one too: whoever asks it then gets its error.
        """
        with contextlib.suppress(Exception):
            await ready[0]
        self.ready += 1
        self.first.set()
        self.free.put_nowait(engine)

    async def take(self, timeout: float) -> int:
        """An engine that is free, to be given back; -1 where none has become ready within `timeout` seconds."""
        try:
            await asyncio.wait_for(self.first.wait(), timeout)
        except TimeoutError:
            return -1
        return await self.free.get()

    async def give(self, engine: int) -> None:
        """Take an engine back."""
        self.free.put_nowait(engine)

    async def count(self) -> int:
        """Engines that have become ready."""
        return self.ready
