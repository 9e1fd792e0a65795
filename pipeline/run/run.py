"""A run: the stages of a recipe, in order, in one folder.

    result = run(load_recipe("recipe.yaml"), "runs/mine")

Each stage reads files and leaves files. What is finished is skipped, what was interrupted goes on, and Ray is started
only when a stage needs it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from otpo.errors import UserError
from pipeline.events.gauges import gauged
from pipeline.lock.lock import one_writer
from pipeline.progress import Progress, silent
from pipeline.recipe import Recipe
from pipeline.run.checks import check_evaluation, check_judges, check_training, check_work
from pipeline.run.context import RunContext
from pipeline.run.engines import Engines
from pipeline.run.folder import RunFolder
from pipeline.run.manifest import enter_recipe, open_run
from pipeline.run.room import check_room
from pipeline.run.sources import Sources
from pipeline.run.stages.base import base
from pipeline.run.stages.generate import generate
from pipeline.run.stages.judge import judge
from pipeline.run.stages.measure import measure
from pipeline.run.stages.pairs import pairs
from pipeline.run.stages.report import report
from pipeline.run.stages.train import train
from pipeline.run.world import World
from pipeline.tracking.mirror import tracking
from pipeline.tracking.trackers import check_trackers


@dataclass(frozen=True)
class RunResult:
    """What a call of `run` did.

    Attributes:
        did: stages that this call finished; empty where there was nothing to do.
        notes: sentences for the person, about what is finished but not whole.
    """

    recipe: Recipe
    folder: RunFolder
    did: list[str]
    notes: list[str]


def run(
    recipe: Recipe,
    folder: str | Path,
    *,
    world: World | None = None,
    progress: Progress = silent,
    until: str = "report",
    redo: bool = False,
) -> RunResult:
    """Do what of a recipe is not done yet.

    Args:
        folder: of the run.
        world: what the recipe's `world:` values stand for.
        progress: called as work proceeds.
        until: last stage: "train" or "report".
        redo: accept a changed recipe under an old name.

    Raises:
        UserError: wrong input; nothing was started.
        WorkError: a stage failed; the same call goes on from there.
    """
    with writing_run(folder, progress):
        evaluates = until == "report" or any(recipe.train_of(label).selects_by_judge for label in recipe.methods)
        check_work(recipe, evaluates=evaluates)
        this = open_context(recipe, folder, world=world, progress=progress, redo=redo, evaluates=evaluates)
        if evaluates:
            check_evaluation(this)
        with tracking(recipe, this.folder, note=this.notes.append), this.engines:
            check_room(this, generates=until == "report" and bool(this.sources.tasks))
            enter_recipe(recipe, this.manifest)
            base(this)
            pairs(this)
            train(this)
            if until == "report":
                generate(this)
                judge(this)
                measure(this)
                report(this)
    return RunResult(this.recipe, this.folder, this.manifest.did, this.notes)


@contextmanager
def writing_run(folder: str | Path, progress: Progress) -> Iterator[None]:
    """Be the one writer of a run's folder for the block.

    Where a block without an earlier run is refused, what its checks wrote (token ids, a world) is removed again.

    Raises:
        UserError: another process writes it, or it cannot be written.
    """
    otherwise = "give this run a name of its own (name=...) or another folder (--runs DIR)"
    place = RunFolder(Path(folder).absolute())
    with one_writer(place.path, otherwise=otherwise, progress=progress):
        there = set(place.path.iterdir())
        try:
            yield
        except UserError:
            for path in set(place.path.iterdir()) - there if not place.manifest.exists() else ():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise


def open_context(
    recipe: Recipe, folder: str | Path, *, world: World | None, progress: Progress, redo: bool, evaluates: bool = False
) -> RunContext:
    """Open a run's folder, prepare its world, and check what training reads. The folder is held by the caller.

    Its recipe and manifest stay as they are until `enter_recipe`, which follows the last check.

    Args:
        evaluates: whether outputs will be judged.

    Raises:
        UserError: the folder holds another recipe's run, the judge is not named, or something that training reads
            cannot be used.
    """
    check_trackers(recipe.tracking)
    progress = gauged(progress, recipe.name)
    place = RunFolder(Path(folder).absolute())
    manifest = open_run(recipe, place.path, redo=redo)
    check_judges(recipe, manifest, evaluates=evaluates)
    sources = Sources(recipe, place, progress)
    this = RunContext(recipe, place, manifest, sources, Engines(recipe, sources), progress, world)
    if recipe.world is not None:
        if world is None:
            raise UserError(
                "The recipe has a `world`, and nothing here knows how to prepare it: use the `otpo` command."
            )
        world.prepare(place.world, recipe.world)
    check_training(this)
    return this
