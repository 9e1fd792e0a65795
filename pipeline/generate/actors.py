"""The engines as Ray actors, and which of them takes the next batch: the first one that is free.

So engines that come late, because their node had to be started, join when they are ready, and faster ones do more.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from otpo.data.template import Rendering
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
from pipeline.generate.engine import EngineConfig, Output, Request, Sampling, generate_outputs
from pipeline.generate.model_folder import ModelFolder, open_model

log = logging.getLogger(__name__)

Call = tuple[ModelFolder, Sampling, Rendering, int]
"""What an engine is asked with each batch: model, sampling, template, tokens of prompt and output together."""


@dataclass(frozen=True)
class StartedEngines:
    """Handles of started engines.

    Attributes:
        actors: of the engines.
        ready: for each an object that is there once it is loaded.
    """

    actors: tuple[Any, ...]
    ready: tuple[Any, ...]

    def close(self) -> None:
        """End the engines and wait until their processes have let go of memory and GPUs."""
        for actor in self.actors:
            ray.kill(actor)
        for actor in self.actors:
            # resolves, with an error, once the actor is dead
            ray.wait([actor.ready.options(max_task_retries=0).remote()], timeout=30)


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
    # `runtime_env` gives a fresh process, so that the environment is set before torch is imported
    threads = None if gpus else engine_threads(len(demands))  # on a GPU torch chooses
    options: dict[str, Any] = {"max_restarts": 1, "runtime_env": {"env_vars": environment(config, threads)}}
    actor: Any = ray.remote(_EngineActor)
    actors = [actor.options(**options, **actor_options(gpus, demand)).remote(config, folder) for demand in demands]
    return StartedEngines(tuple(actors), tuple(actor.ready.remote() for actor in actors))


def stream(
    engines: StartedEngines, batches: Sequence[Sequence[Request]], call: Call, timeout: float
) -> Iterator[tuple[list[Output], int]]:
    """Outputs as they are finished, in any order, and how many engines are up.

    An engine that dies (out of memory, a lost node) is loaded once more and asked for what it still owes.

    Args:
        batches: an engine takes the next one when it has finished its last.
        timeout: seconds until a first engine must be ready.

    Raises:
        TimeoutError: none was.
        ray.exceptions.RayError: what an engine raised, or that one died twice.
    """
    waiting = deque(batches)
    marks: dict[Any, int] = {mark: engine for engine, mark in enumerate(engines.ready)}
    """What is waited for, that an engine is loaded or its next outputs, and which engine it is."""
    owed: dict[int, dict[tuple[str, int], Request]] = {engine: {} for engine in marks.values()}
    up, died = set[int](), set[int]()
    try:
        while waiting or any(owed.values()):
            found, _ = ray.wait(list(marks), timeout=None if up else timeout)
            if not found:
                raise TimeoutError
            engine = marks.pop(found[0])
            try:
                outputs = _arrived(found[0])
            except ray.exceptions.RayActorError:
                if engine in died:
                    raise
                died.add(engine)
                up.discard(engine)
                marks[engines.actors[engine].ready.remote()] = engine
                continue
            up.add(engine)
            if outputs:
                marks[found[0]] = engine
                for output in outputs:
                    del owed[engine][output.id, output.sample]
                yield outputs, len(up)
                continue
            if not owed[engine] and waiting:
                owed[engine] = {(request.id, request.sample): request for request in waiting.popleft()}
            if owed[engine]:
                marks[engines.actors[engine].generate.remote(list(owed[engine].values()), *call)] = engine
    finally:
        for mark in marks:
            if isinstance(mark, ray.ObjectRefGenerator):
                ray.cancel(mark)


def _arrived(mark: Any) -> list[Output]:
    """An engine's next outputs; none says that it is free, loaded just now or done with its batch."""
    if not isinstance(mark, ray.ObjectRefGenerator):
        ray.get(mark)
        return []
    try:
        return ray.get(next(mark))
    except StopIteration:
        return []


class _EngineActor:
    """One engine in one process."""

    def __init__(self, config: EngineConfig, folder: ModelFolder) -> None:
        self.engine = start(config, _here(folder))

    @ray.method(max_task_retries=-1)  # while it is loaded again
    def ready(self) -> None:
        """Returns once the engine is loaded."""

    def generate(
        self, requests: list[Request], folder: ModelFolder, sampling: Sampling, template: Rendering, limit: int
    ) -> Iterator[list[Output]]:
        """Outputs for a batch of requests as they are finished, until the driver wants no more."""
        context = ray.get_runtime_context()
        for outputs in generate_outputs(self.engine, _here(folder), requests, sampling, template, limit):
            if context.is_canceled():
                return
            if outputs:
                yield outputs


def _here(folder: ModelFolder) -> ModelFolder:
    """The folder on this node: a hub model is in each node's own cache."""
    return folder if folder.path.is_dir() else open_model(folder.name)
