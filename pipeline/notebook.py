"""What a notebook asks of a run: make a recipe, run its stages, read what they left as DataFrames."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otpo.errors import UserError
from pipeline.progress import Lines, Progress
from pipeline.recipe import Recipe, load_recipe
from pipeline.recipe import make_recipe as recipe_of_tree
from pipeline.run.folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd

    from eval.board.run_files import RunFiles
    from pipeline.run.world import World

__all__ = ["Recipe", "Results", "load_recipe", "make_recipe", "open_run", "run_recipe"]


def make_recipe(tree: Mapping[str, Any] | None = None, /, **sections: Any) -> Recipe:
    """A recipe from a dictionary, from keyword arguments, or from both (a keyword replaces a section).

        make_recipe(name="mine", model={"path": "my/model"}, data={"path": "pairs.jsonl"}, methods={"otpo": {}})

    Raises:
        UserError: what is given does not make a recipe; the message names each key.
    """
    return recipe_of_tree({**(tree or {}), **sections})


def run_recipe(
    recipe: Recipe,
    *,
    runs: str | Path = "runs",
    until: str = "report",
    redo: bool = False,
    progress: Progress | None = None,
    world: World | None = None,
) -> Results:
    """Do what of a recipe is not done yet, as `otpo run` and `otpo train` do.

    Args:
        recipe: of `load_recipe` or `make_recipe`. The run's folder is `runs/<name of the recipe>`.
        runs: a folder, or an address on object storage such as `s3://bucket/runs`.
        until: the last stage: "train" or "report".
        redo: accept a changed recipe under an old name; what it changes is done again.
        progress: called with (what, done, total, remark); by default lines are printed to stderr.
        world: what stands behind `world:` in a recipe: `jobs.worlds.world_of(recipe)`.

    Raises:
        UserError: wrong input; nothing was started.
        WorkError: a stage failed; the same call goes on from there.
    """
    if until not in ("train", "report"):
        raise UserError(f"run_recipe: expected until='train' or 'report', found {until!r}.")
    from pipeline.run.run import run
    from pipeline.storage.stored import run_folder

    progress = progress or Lines()
    with run_folder(runs, recipe.name, progress=progress) as folder:
        done = run(recipe, folder, world=world, progress=progress, until=until, redo=redo)
    return Results(folder, list(done.notes))


def open_run(folder: str | Path) -> Results:
    """Read the folder of a run, of a sweep, or of `otpo judge`, whether finished or not.

    Raises:
        UserError: there is no such folder, or it holds nothing of a run.
    """
    results = Results(Path(folder))
    _ = results.files
    return results


class Results:
    """What a run left, as DataFrames. Each is read once, at its first use; call `open_run` again to see newer files.

    Attributes:
        folder: of the run. notes: sentences about what is finished but not whole, of the call that made it.
    """

    def __init__(self, folder: Path, notes: list[str] | None = None):
        self.folder, self.notes = folder, notes or []

    def __repr__(self) -> str:
        return f"Results({str(self.folder)!r})"

    @cached_property
    def files(self) -> RunFiles:
        """Everything that was found in the folder."""
        from eval.board.run_files import read_run

        return read_run(self.folder)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """Training metrics: a row for each `label` and `step`, with the step's evaluation (`eval_*`) beside it."""
        import pandas as pd

        frames = [frame.assign(label=label) for label, frame in self.files.metrics.items() if len(frame)]
        if not frames:
            return pd.DataFrame(columns=["label", "step"])
        # a step and its evaluation are two lines of the file
        return pd.concat(frames).groupby(["label", "step"], sort=False).first().reset_index()

    @cached_property
    def outputs(self) -> pd.DataFrame:
        """What the models generated: a row for each `label`, `task` and instruction, in AlpacaEval's columns."""
        import pandas as pd

        rows = [
            {"label": label, "task": task, **row}
            for task, models in self.files.outputs.items()
            for label, rows in models.items()
            for row in rows
        ]
        return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["label", "task", "instruction", "output"])

    @cached_property
    def verdicts(self) -> pd.DataFrame:
        """The judge's verdicts: the rows of verdicts.parquet of every task."""
        import pandas as pd

        frames = list(self.files.verdicts.values())
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["generator", "task"])

    @cached_property
    def leaderboard(self) -> pd.DataFrame:
        """The leaderboard: a row for each model, task and reference, in AlpacaEval's columns and ours."""
        import pandas as pd

        from eval.board.leaderboard import COLUMNS

        return pd.DataFrame(columns=list(COLUMNS)) if self.files.board is None else self.files.board

    def model(self, label: str) -> Path:
        """Folder of a trained model, which transformers and vLLM load.

        Raises:
            UserError: there is none of that label.
        """
        run = RunFolder(self.folder)
        folder = run.model(label)
        there = (path.name for path in run.models.glob("*") if run.model(path.name).exists())
        trained = sorted(filter(self.files.has, there))
        if label not in trained:
            raise UserError(f"{self.folder}: no trained model '{label}'. Trained here: {', '.join(trained) or 'none'}.")
        return folder
