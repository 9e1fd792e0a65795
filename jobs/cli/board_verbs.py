"""The verbs of a leaderboard that is kept in a folder: `otpo board init`, `add`, `remove`, `update`, and so on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.cli.options import OutputColumn, columns_of, in_flags, local
from jobs.cli.options.batch import BatchOptions
from jobs.cli.options.judge import BoardOptions, CountMissing, JudgeOptions, with_groups
from jobs.cli.progress import Bars
from jobs.cli.terminal import console, say, show, stderr

if TYPE_CHECKING:
    import pandas as pd

    from eval.judge.config import JudgeConfig
    from jobs.boards.kept import Kept
    from pipeline.progress import Progress

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="the leaderboard's folder", callback=local)]
Replace = Annotated[bool, typer.Option("--replace", help="take these in place of others of the same name")]
ANOTHER_BOARD = "keep another leaderboard in another folder"

board = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="A leaderboard that is kept in a folder: models come and go, and only new verdicts are paid.",
)


@with_groups
def init(
    folder: Folder,
    reference: Annotated[
        Path, typer.Option("--reference", help="outputs that all models are compared with, as model_outputs.json")
    ],
    asked: BoardOptions,
) -> None:
    """Make a leaderboard: its reference, its judge, its protocol. Asks nothing."""
    from jobs.boards.keeping import build
    from jobs.boards.kept import Kept
    from jobs.boards.making import init as make
    from pipeline.lock.lock import one_writer

    asked.check("--reward-model", asked.reward_model)
    template, _ = asked.rendering()
    config = asked.config()
    with Bars(stderr) as bars, one_writer(folder, otherwise=ANOTHER_BOARD, progress=bars.show):
        state, new = make(folder, reference, config, task=asked.task, template=template, progress=bars.show)
        if new:
            build(Kept(folder, state), bars.show)
    models = f"{len(state.models)} model" + ("" if len(state.models) == 1 else "s")
    show(
        f"{folder} is new." if new else f"{folder} is there already, with {models}; its judge is asked so from now on."
    )
    show(f"Add models: otpo board add {folder} OUTPUTS...")


@with_groups
def add(
    folder: Folder,
    outputs: Annotated[
        list[str],
        typer.Argument(help="files of outputs, as model_outputs.json; NAME=FILE makes the file one model of that name"),
    ],
    asked: JudgeOptions,
    *,
    replace: Replace = False,
    column: OutputColumn = None,
    count_missing: CountMissing = False,
    files: BatchOptions,
) -> None:
    """Add models by their outputs. Models that are there already stay as they are."""
    from jobs.boards.keeping import add as add_models

    offline = files.offline(asked)
    with _kept(folder) as (kept, progress):
        config = _config(kept, asked, columns=columns_of(column), count_missing=count_missing)
        made = add_models(kept, outputs, config, replace=replace, offline=offline, progress=progress)
    _show(folder, made)


def remove(
    folder: Folder,
    names: Annotated[list[str], typer.Argument(help="models, or files that were imported")],
) -> None:
    """Take models or imported files off. Their verdicts stay paid: adding them again costs nothing."""
    from jobs.boards.keeping import build
    from jobs.boards.keeping import remove as take_off
    from jobs.boards.kept import Kept

    with _kept(folder) as (kept, progress):
        state, gone = take_off(kept, names)
        made = build(Kept(folder, state), progress)
    say(f"Removed: {', '.join(gone)}")
    _show(folder, made)


@with_groups
def update(
    folder: Folder,
    asked: JudgeOptions,
    *,
    renew: Annotated[
        bool,
        typer.Option(
            "--renew", help="where the judge's name came to answer as another model: ask that one about everything"
        ),
    ] = False,
    files: BatchOptions,
) -> None:
    """Ask for every verdict that is missing, and make the pages: what a scheduled job runs."""
    from jobs.boards.keeping import update as ask_for_missing

    offline = files.offline(asked)
    with _kept(folder) as (kept, progress):
        made = ask_for_missing(kept, _config(kept, asked), renew=renew, offline=offline, progress=progress)
    _show(folder, made)


@with_groups
def rejudge(folder: Folder, asked: JudgeOptions, files: BatchOptions) -> None:
    """Another judge, or another protocol, for all of the board; says what that changes."""
    from jobs.boards.keeping import rejudge as judge_again

    offline = files.offline(asked)
    with _kept(folder) as (kept, progress):
        made, found = judge_again(kept, _config(kept, asked), offline=offline, progress=progress)
    if found is not None:
        from eval import layout
        from eval.board.judges import migration_sentences
        from eval.board.terminal import migration_table

        console.print(migration_table(found))
        for sentence in migration_sentences(found):
            show(sentence)
        show(f"Figures: {(folder / layout.MIGRATION).absolute()}")
    _show(folder, made)


def import_(
    folder: Folder,
    files: Annotated[
        list[str],
        typer.Argument(
            help="AlpacaEval's leaderboard (CSV), or results of lm-evaluation-harness (JSON); NAME=FILE says which"
            " model of the board results are of"
        ),
    ],
    beside: Annotated[
        bool, typer.Option("--beside", help="published rows that were judged otherwise get a table of their own")
    ] = False,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", show_default=False, help="take this published row alone; may be given several times"),
    ] = None,
    judged_by: Annotated[str, typer.Option("--judged-by", help="who judged the published rows")] = "gpt-4-1106-preview",
    replace: Replace = False,
) -> None:
    """Import published rows of AlpacaEval, or figures of lm-evaluation-harness as columns. Asks nothing."""
    from jobs.boards.importing import import_files
    from jobs.boards.keeping import build
    from jobs.boards.kept import Kept

    with _kept(folder) as (kept, progress):
        state = import_files(
            *(folder, kept.state, kept.reference(), files),
            beside=beside, only=model or (), judged_by=judged_by, replace=replace, progress=progress,
        )  # fmt: skip
        made = build(Kept(folder, state), progress)
    _show(folder, made)


def build(folder: Folder) -> None:
    """Make leaderboard and pages of the verdicts that are there. Asks nothing, and needs no key."""
    from jobs.boards.keeping import build as make

    with _kept(folder) as (kept, progress):
        made = make(kept, progress)
    _show(folder, made)


for name, verb in (
    ("init", init),
    ("add", add),
    ("remove", remove),
    ("update", update),
    ("rejudge", rejudge),
    ("import", import_),
    ("build", build),
):
    board.command(name)(in_flags(verb))


@contextmanager
def _kept(folder: Path) -> Iterator[tuple[Kept, Progress]]:
    """A leaderboard that this process alone writes, and where to tell progress."""
    from jobs.boards.kept import Kept
    from jobs.boards.state import read_state
    from pipeline.lock.lock import one_writer

    read_state(folder)  # a folder that holds none is refused before a lock is put there
    with Bars(stderr) as bars, one_writer(folder, otherwise=ANOTHER_BOARD, progress=bars.show):
        yield Kept(folder, read_state(folder)), bars.show


def _config(kept: Kept, asked: JudgeOptions, **given: Any) -> JudgeConfig:
    """The board's judge with what a person says now."""
    there = kept.state.config(kept.folder).model_dump(exclude_defaults=True)
    return asked.config(**there | given)


def _show(folder: Path, made: pd.DataFrame | list[str]) -> None:
    """Show a leaderboard, or what there is to say without one."""
    if isinstance(made, list):
        for line in made:
            show(line)
        return
    from eval.board.sentences import published_sentence
    from eval.board.terminal import terminal_notes, terminal_table
    from pipeline.run.folder import RunFolder

    own = made[made["imported"] == ""]
    if len(own):
        console.print(terminal_table(own))
        for note in terminal_notes(own):
            show(note)
    else:
        show(f"{folder} has no judged model yet.")
    if published := published_sentence(made):
        show(published)
    show(f"Report: {RunFolder(folder.absolute()).report}")
