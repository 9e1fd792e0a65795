"""Room in a cluster for trainings, and for what generates and judges beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from otpo.errors import UserError
from pipeline.recipe import Recipe

if TYPE_CHECKING:
    from pipeline.cluster.placement import Allocation, Node


def allocate(
    recipe: Recipe, nodes: Sequence[Node], *, trainings: int, workers: int, use_gpu: bool | str, judged: bool
) -> Allocation:
    """How a cluster is divided among trainings, engines, and a judge where vLLM serves it.

    Args:
        nodes: of the cluster.
        trainings: most of them at a time. workers: of each.
        use_gpu: as `train.use_gpu`.
        judged: whether models are answered with, and judged, while others train.

    Raises:
        UserError: it has no room for one training, for an engine, or for the judge beside them.
    """
    from pipeline.cluster.placement import (
        TrainingRoom,
        allocate_trials,
        any_gpu,
        beside_judge,
        check_engines,
        engine_demands,
    )

    on_gpu = TrainingRoom.of(nodes).check(workers, use_gpu=use_gpu)
    engines = recipe.generate.workers if judged else 0
    gpus = recipe.generate.tensor_parallel_size if any_gpu(nodes) else 0
    if judged:
        check_engines(engines, gpus, nodes)
        held = judge_gpus(recipe, nodes)
        nodes = beside_judge(held, nodes)
        trains = not on_gpu or TrainingRoom.of(nodes).workers(gpu=True) >= workers
        if not (trains and engine_demands(engines, gpus, nodes)):
            raise UserError(
                f"judge.vllm holds {held} GPU{'s' * (held > 1)} while models train, and what is left has no room for"
                f" {workers} training worker{'s' * (workers > 1)} and an engine: add GPUs, or serve the model elsewhere"
                " (`vllm serve MODEL`) and set judge.url."
            )
    return allocate_trials(nodes, trials=trainings, workers=workers, engines=engines, engine_gpus=gpus, on_gpu=on_gpu)


def check_judged_beside(recipe: Recipe, nodes: Sequence[Node], workers: int) -> None:
    """Refuse a training whose best step a judge chooses where it would leave no room for what judges it meanwhile.

    Args:
        workers: of the training.

    Raises:
        UserError: as `allocate`, or an engine would have to wait for the training that it judges.
    """
    train = recipe.train
    if not allocate(recipe, nodes, trainings=1, workers=workers, use_gpu=train.use_gpu, judged=True).keep_engine:
        raise UserError(
            "train.best_metric is a figure of the judge's, who judges while training goes on, and there is no GPU for"
            " an engine beside the workers: take fewer train.workers, add a GPU, or a metric of an evaluation such as"
            " eval_loss."
        )


def judge_gpus(recipe: Recipe, nodes: Sequence[Node]) -> int:
    """GPUs that the judge holds for as long as models train: those of a model that vLLM serves on the cluster."""
    from pipeline.cluster.placement import any_gpu

    return recipe.judge.vllm.gpus if recipe.judge.vllm and any_gpu(nodes) else 0
