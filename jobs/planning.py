"""`otpo plan`: a recipe and a machine, real or imagined, into a plan."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

from jobs.worlds import world_of
from otpo.errors import UserError
from otpo.models.adapters import check_quantization
from otpo.models.disk.present import missing, not_of_the_hub
from pipeline.cluster.placement import TrainingRoom
from pipeline.plan import GPUS, Lengths, Machine, Plan, assumed, gpu_machine, known_gpu, measured, plan, shape_of
from pipeline.plan.machine import UTILISATION
from pipeline.plan.serving import Serving, serving
from pipeline.progress import silent
from pipeline.recipe import Recipe, load_recipe
from pipeline.recipe.data import DataConfig
from pipeline.run.checks import check_work
from pipeline.run.folder import RunFolder
from pipeline.run.sources import Sources
from pipeline.train.models import model_limits

SAMPLE = 2000  # rows whose lengths are measured


def plan_recipe(
    source: str,
    overrides: list[str],
    *,
    gpu: str | None,
    nodes: int,
    gpus_per_node: int | None,
    price: float | None,
    utilisation: float | None,
    rows: int | None,
) -> tuple[Plan, Serving | None]:
    """Plan the training of a recipe, and the generation and judging that follow.

    Lengths are measured on the first rows of local data files; a hub's data set is not fetched, and assumed.

    Args:
        gpu: a kind; None is this machine. nodes, gpus_per_node: of the machine.
        price: USD of a GPU for an hour. utilisation: share of a GPU's peak that a step reaches; None is what
            plans assume.
        rows: of the data.

    Raises:
        UserError: a recipe, a model or a machine that cannot be planned.
    """
    recipe = load_recipe(source, overrides)
    check_work(recipe, evaluates=False)
    machine = _machine(recipe, gpu, nodes, gpus_per_node, utilisation, price)
    if machine.gpu is None:
        check_quantization(recipe.model.quantization, gpu=False)
    lora = recipe.model.lora.model_dump() if recipe.model.lora else None
    with tempfile.TemporaryDirectory() as temporary:
        folder = RunFolder(Path(temporary))
        if (world := world_of(recipe)) is not None and recipe.world is not None:
            world.prepare(folder.world, recipe.world)
        path = Sources(recipe, folder, silent).resolve(recipe.model.path)
        if not Path(path).exists() and (reason := not_of_the_hub(path)):
            raise UserError(f"model.path: {missing(path, reason)}")
        limits = model_limits(path, recipe, list(recipe.methods) or ["base"])
        shape = replace(shape_of(path, lora, recipe.model.attn_implementation), name=recipe.model.path)
        lengths = _lengths(recipe, folder, rows, limits.positions)
    return plan(recipe, shape, machine, lengths), serving(recipe, shape, machine)


def _machine(
    recipe: Recipe, gpu: str | None, nodes: int, per_node: int | None, utilisation: float | None, price: float | None
) -> Machine:
    if utilisation is None:
        utilisation = UTILISATION
    if not 0 < utilisation <= 1:
        raise UserError(f"--utilisation is a share of the GPU's peak, above 0 and at most 1; found {utilisation:g}")
    train = recipe.train
    workers = train.fewest_workers
    if gpu is not None:
        if train.use_gpu is False:
            raise UserError(f"--gpu {gpu}: the recipe trains on CPUs (train.use_gpu is false). Leave one of them out.")
        return gpu_machine(
            gpu, nodes=nodes, per_node=workers if per_node is None else per_node, utilisation=utilisation, usd=price
        )
    import torch

    gpus = torch.cuda.device_count()
    if train.use_gpu is True and not gpus:
        raise UserError(
            "The recipe trains on GPUs (train.use_gpu), and this machine has none: name the kind that it will run on"
            f" with --gpu, of {', '.join(GPUS)}."
        )
    room = TrainingRoom.of([{"CPU": max(workers, os.cpu_count() or 1), "GPU": gpus}])
    if not room.check(workers, use_gpu=train.use_gpu):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Machine(None, workers, workers, memory)
    found = torch.cuda.get_device_properties(0)
    kind = known_gpu(found.name, found.total_memory)
    if kind is None:
        raise UserError(f"This machine's GPU is a {found.name}: name one like it with --gpu, of {', '.join(GPUS)}.")
    return Machine(kind, workers, workers, kind.memory, utilisation=utilisation, usd_per_gpu_hour=price)


def _lengths(recipe: Recipe, folder: RunFolder, rows: int | None, positions: int | None) -> Lengths:
    """Measured on local data files, by the tokenizer of a local model; else assumed, at most `positions` long."""
    from otpo.data.token_file import load_tokens

    data = recipe.data
    sources: dict[str, str | None] = {f"data.datasets.{name}": each.path for name, each in data.datasets.items()}
    sources = sources or {"data.path": data.path}
    distant = [name for name, path in sources.items() if path is None or not Path(path).expanduser().is_file()]
    if distant or not Path(recipe.model.path).is_dir():
        longest = min(data.max_length, positions or data.max_length)
        found = assumed(recipe.model_copy(update={"data": data.model_copy(update={"max_length": longest})}), rows)
        why = f"; {distant[0] if distant else 'model.path'} is not here to be measured" * data.given
        return replace(found, source=found.source + why)
    sample = recipe.model_copy(update={"data": _first_rows(data)})
    try:
        tokens = Sources(sample, folder, silent).tokens()
    except UserError as error:
        raise UserError(f"{error} A plan reads the first {SAMPLE:,} rows.") from error
    name = f"{len(sources)} data sets" if data.datasets else str(data.path)
    found = measured(load_tokens(tokens.train), name)
    asked = [each.limit for each in data.datasets.values()] or [data.limit]
    reports = [each.report for each in tokens.sets] or [tokens.report]
    whole = all(
        report.n_rows < SAMPLE or (limit or SAMPLE + 1) <= SAMPLE for report, limit in zip(reports, asked, strict=True)
    )
    if whole or rows:
        epoch = sum(each.taken for each in tokens.sets) or found.rows
        return replace(found, rows=_trained(recipe, rows or epoch))
    return replace(found, rows=assumed(recipe).rows, source=f"{found.source}; their number is assumed (--rows)")


def _first_rows(data: DataConfig) -> DataConfig:
    """The first rows of each data set, none held out."""

    def most(limit: int | None) -> int:
        return min(limit or SAMPLE, SAMPLE)

    if not data.datasets:
        return data.model_copy(update={"limit": most(data.limit), "validation": 0.0})
    sets = {name: each.model_copy(update={"limit": most(each.limit)}) for name, each in data.datasets.items()}
    return data.model_copy(update={"datasets": sets, "validation": 0.0})


def _trained(recipe: Recipe, rows: int) -> int:
    """Rows that are not held out."""
    return assumed(recipe, rows).rows
