"""The engines of a run: started when a stage first generates, kept for every model, closed to make room."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from pipeline.recipe import Recipe
from pipeline.run.sources import Sources

if TYPE_CHECKING:
    from pipeline.generate.engine import EngineConfig
    from pipeline.generate.pool import EnginePool


def engine_config(recipe: Recipe) -> EngineConfig:
    """The engines that the recipe asks for."""
    from pipeline.generate.engine import EngineConfig

    names = ("backend", "dtype", "max_model_len", "workers", "tensor_parallel_size", "gpu_memory_utilization")
    return EngineConfig(**{name: getattr(recipe.generate, name) for name in names})


class Engines:
    """Holds the engine pool of a run; a context manager that closes it at the end."""

    def __init__(self, recipe: Recipe, sources: Sources):
        self.recipe, self.sources = recipe, sources
        self._pool: EnginePool | None = None
        self._on_training_nodes = True
        self._judge_gpus = 0

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def on_gpu(self) -> bool:
        """Whether engines are up and hold GPUs."""
        return self._pool is not None and self._pool.config.device == "gpu"

    def pool(self) -> EnginePool:
        """The engines; the first call starts them, with Ray where it is not up."""
        if self._pool is None:
            from pipeline.cluster.connect import connect
            from pipeline.generate.pool import EnginePool

            connect(self.recipe.cluster.address)
            start = self.sources.start.path
            self._pool = EnginePool(
                engine_config(self.recipe),
                start,
                self.sources.generation_template,
                on_training_nodes=self._on_training_nodes,
                judge_gpus=self._judge_gpus,
            )
        return self._pool

    def join_cluster(self) -> None:
        """Connect to the Ray cluster that the recipe or RAY_ADDRESS names, if one does: its GPUs can then be used."""
        if self.recipe.cluster.address or os.environ.get("RAY_ADDRESS"):
            from pipeline.cluster.connect import connect

            connect(self.recipe.cluster.address)

    def leave_training_nodes(self) -> None:
        """From now on, leave the nodes that are set apart for training: models are trained beside the engines."""
        self._on_training_nodes = False
        if self.on_gpu:
            self.close()

    def leave_to_judge(self, gpus: int) -> None:
        """From now on, leave so many GPUs of a node to a judge that vLLM serves beside the engines."""
        if gpus != self._judge_gpus and self.on_gpu:
            self.close()
        self._judge_gpus = gpus

    def close(self) -> None:
        """End the engines and give their memory back; a later `pool()` starts them again."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
