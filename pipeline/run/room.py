"""Whether the cluster has room for what a run asks of it, found out before hours of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.milestones.room import check_judged_beside
from pipeline.recipe import Recipe, TrainConfig
from pipeline.run.context import RunContext
from pipeline.run.engines import engine_config

if TYPE_CHECKING:
    from pipeline.cluster.placement import Node


def check_room(run: RunContext, *, generates: bool) -> None:
    """Refuse training workers and engines that the cluster cannot hold; say what will be otherwise than asked for.

    Does nothing where no model is to be trained: what is left then finds out by itself at once.

    Args:
        generates: whether engines are started after training. Sampled pairs want them too.

    Raises:
        UserError: there is too little room, or a node that cannot do its part; nothing was started.
    """
    recipe, manifest = run.recipe, run.manifest
    groups = [recipe.train_of("base")] if recipe.base and not manifest.finished("base") else []
    untrained = [label for label in recipe.methods if not manifest.finished(f"train/{label}")]
    groups += [recipe.train] if untrained else []
    if not groups:
        return
    from pipeline.cluster.connect import connect
    from pipeline.cluster.nodes import check_nodes
    from pipeline.cluster.placement import grows, live_nodes
    from pipeline.events.log import record

    if where := connect(recipe.cluster.address):
        record(run.folder.events, "Ray", where)
        run.progress("Ray", 0, 0, where)
    generates = generates or (recipe.pairs is not None and not manifest.finished("pairs"))
    nodes = live_nodes()
    if any(recipe.train_of(label).selects_by_judge for label in untrained):
        check_judged_beside(recipe, nodes, recipe.train.fewest_workers)
    for what, sentence in find_room(recipe, nodes, groups, generates=generates, grows=grows()):
        run.progress(what, 0, 0, sentence)
        if what == "training":
            run.notes.append(f"Training ran {sentence}.")
    check_nodes(run.folder.path, _read_by_workers(run))


def _read_by_workers(run: RunContext) -> dict[str, str]:
    """Local folders that workers read, beside the run's own: key of the recipe -> path."""
    named = {"model.path": run.recipe.model.path}
    for label in run.recipe.methods:
        models = run.recipe.method(label).frozen_models
        named |= {f"methods.{label}.{name}": path for name, path in models.items() if path not in run.recipe.methods}
    found = {key: Path(run.sources.resolve(path)) for key, path in named.items()}
    return {key: str(path.absolute()) for key, path in found.items() if path.exists()}


def find_room(
    recipe: Recipe, nodes: Sequence[Node], groups: Sequence[TrainConfig], *, generates: bool, grows: bool
) -> list[tuple[str, str]]:
    """What will be otherwise than a recipe asks for: ("training" or "engines", a sentence).

    Args:
        nodes: what the cluster has.
        groups: the groups of training workers.
        generates: whether engines are started.
        grows: whether an autoscaler may add nodes for engines.

    Raises:
        UserError: there is too little room.
    """
    from pipeline.cluster.placement import TrainingRoom, any_gpu, check_engines, check_precision, fewer_engines

    room, said = TrainingRoom.of(nodes), []
    for train in groups:
        room.check(train.fewest_workers, use_gpu=train.use_gpu)
        why = room.why_on_cpu(train.fewest_workers, use_gpu=train.use_gpu)
        if why and ("training", why) not in said:
            said.append(("training", why))
    if generates:
        config = engine_config(recipe)
        gpus = config.tensor_parallel_size if any_gpu(nodes) else 0
        found = check_engines(config.workers, gpus, nodes)
        if gpus and config.backend != "transformers":
            check_precision(config.dtype, nodes)
        fewer = fewer_engines(config.workers, len(found), waiting=grows)
        said += [("engines", fewer)] if fewer else []
        judges = {"judge": recipe.judge} | ({"pairs.scorer": recipe.pairs.scorer} if recipe.pairs else {})
        for key, judge in judges.items():
            if gpus and judge.vllm:
                check_engines(1, judge.vllm.gpus, nodes, key=f"{key}.vllm.tensor_parallel_size")
    return said
