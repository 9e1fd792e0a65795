"""A study: methods tuned with equal budgets, then trained with fresh seeds, and compared with intervals over the seeds.

otpo study study

Every regime has a sweep in `runs/<name>-<regime>` and a run for each seed in `runs/<name>-<regime>-seed-<seed>`, which
go on where they were stopped. What comes out is in `runs/<name>`: `study.csv`, `study.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from otpo.errors import WorkError
from otpo.files import write_atomically
from pipeline.progress import Progress, silent
from pipeline.recipe import Recipe, load_recipe
from pipeline.run.folder import RunFolder
from pipeline.run.run import run
from pipeline.run.world import World
from pipeline.storage.stored import run_folder
from pipeline.study.recipes import Regime, regimes, seed_recipe, tuned_values
from pipeline.sweep.sweep import Say, sweep

if TYPE_CHECKING:
    import pandas as pd

CSV, MARKDOWN = "study.csv", "study.md"


@dataclass(frozen=True)
class StudyResult:
    """What a call of `study` left.

    Attributes:
        table: a row for each regime, seed, label and figure.
        text: the tables in Markdown.
        did: whether this call did anything.
    """

    folder: Path
    table: pd.DataFrame
    text: str
    did: bool


def study(
    recipe: Recipe,
    runs: str | Path,
    *,
    world_of: Callable[[Recipe], World | None],
    progress: Progress = silent,
    say: Say = print,
    redo: bool = False,
) -> StudyResult:
    """Do what of a study is not done yet.

    Args:
        runs: the folder that holds the runs, or its address.
        world_of: gives what the `world:` values of a recipe stand for.
        progress: called as work proceeds. say: called with a line that a person should read.
        redo: accept a changed recipe under an old name.

    Raises:
        UserError: wrong input; nothing was started. WorkError: a part failed; what is finished is kept.
    """
    import pandas as pd

    from eval.studies.markdown import study_text

    found = regimes(recipe)
    frames, tuned, did = [], {}, False
    for regime in found:
        say(f"{regime.recipe.name}: {', '.join(regime.labels)} are tuned.")
        with run_folder(runs, regime.recipe.name, progress=progress) as place:
            best, fresh = _tune(regime, place, world_of, progress, say, redo)
        did |= fresh
        tuned[regime.name] = tuned_values(regime, best)
        for seed in recipe.study.seeds:
            say(f"{regime.recipe.name}: seed {seed}.")
            frame, fresh = _run_seed(seed_recipe(regime.recipe, best, seed), runs, world_of, progress, redo)
            frames.append(frame.assign(regime=regime.name, seed=seed))
            did |= fresh
    table = pd.concat(frames, ignore_index=True)[["regime", "seed", "label", "figure", "value"]]
    text = study_text(recipe.name, table, tuned)
    with run_folder(runs, recipe.name, progress=progress) as place:
        place.mkdir(parents=True, exist_ok=True)
        table.to_csv(place / CSV, index=False)
        write_atomically(place / MARKDOWN, text)
    return StudyResult(place, table, text, did)


def _tune(
    regime: Regime,
    place: Path,
    world_of: Callable[[Recipe], World | None],
    progress: Progress,
    say: Say,
    redo: bool,
) -> tuple[Recipe, bool]:
    """The recipe with the best values of each label, and whether anything was done for it."""
    outcomes = sweep(regime.recipe, place, world=world_of(regime.recipe), progress=progress, say=say, redo=redo)
    if missing := [outcome.search.label for outcome in outcomes if outcome.best is None]:
        results = RunFolder(place).sweep.results
        raise WorkError(
            f"No trial of {missing[0]} came to its end, so it cannot be compared; {results} has the reasons. The same"
            " command tries failed trials again."
        )
    return load_recipe(outcomes[0].folder.best), outcomes[0].did


def _run_seed(
    recipe: Recipe,
    runs: str | Path,
    world_of: Callable[[Recipe], World | None],
    progress: Progress,
    redo: bool,
) -> tuple[pd.DataFrame, bool]:
    """The figures of one seed, and whether anything was done for them."""
    from eval.studies.figures import run_figures

    with run_folder(runs, recipe.name, progress=progress) as place:
        done = run(recipe, place, world=world_of(recipe), progress=progress, redo=redo)
        return run_figures(place, recipe.labels()), bool(done.did)
