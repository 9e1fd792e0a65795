"""Verbs about outputs that are there: judge, agreement, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli.options import ANOTHER_OUT, Out
from jobs.cli.options.batch import BatchOptions
from jobs.cli.options.judge import BoardOptions, JudgeOptions, with_groups
from jobs.cli.progress import Bars
from jobs.cli.terminal import console, say, show, stderr


@with_groups
def judge(
    outputs: Annotated[
        list[str],
        typer.Argument(help="files of outputs, as model_outputs.json; NAME=FILE makes the file one model of that name"),
    ],
    reference: Annotated[Path, typer.Option("--reference", help="outputs of the baseline, in a file of the same kind")],
    out: Out,
    asked: BoardOptions,
    *,
    subset: Annotated[
        bool, typer.Option("--subset", help="the outputs cover only a part of the reference's instructions")
    ] = False,
    files: BatchOptions,
) -> None:
    """Verdicts, win rates and lengths of outputs against a reference."""
    from jobs.batching import Asked, without_calls
    from jobs.judging import judge_files, read_files
    from pipeline.lock.lock import one_writer

    offline = files.offline(asked)
    if not offline:
        asked.check("--reward-model", asked.reward_model)
    config = asked.config()
    if offline.asks_nothing:
        with Bars(stderr) as bars, one_writer(out, otherwise=ANOTHER_OUT, progress=bars.show):
            rows, theirs = read_files(outputs, reference, config, subset, bars.show)
            questions = Asked(rows, theirs, config, out, asked.task, reference.name, subset)
            for line in without_calls(offline, questions, bars.show):
                show(line)
        return
    template, said = asked.rendering()
    if said:
        say(said)
    with Bars(stderr) as bars, one_writer(out, otherwise=ANOTHER_OUT, progress=bars.show):
        board = judge_files(
            *(outputs, reference, config, out, asked.task),
            progress=bars.show,
            subset=subset,
            template=template,
            batch=offline.read,
        )
    from eval.board.terminal import terminal_notes, terminal_table
    from pipeline.run.folder import RunFolder

    console.print(terminal_table(board))
    for note in terminal_notes(board):
        show(note)
    show(f"Report: {RunFolder(out.absolute()).report}")


@with_groups
def agreement(
    pairs: Annotated[list[Path], typer.Argument(help="files of LLMBar, PandaLM, RewardBench, or of your own")],
    out: Out,
    asked: JudgeOptions,
) -> None:
    """The judge against people: pairs with their labels, asked in both orders."""
    from jobs.agreement import judge_agreement
    from pipeline.lock.lock import one_writer

    asked.check()
    config = asked.config(both_orders=True)
    with Bars(stderr) as bars, one_writer(out, otherwise=ANOTHER_OUT, progress=bars.show):
        found = judge_agreement(pairs, config, out, progress=bars.show)
    from eval import layout
    from eval.board.judges import agreement_sentences
    from eval.board.terminal import agreement_table

    console.print(agreement_table(found))
    for sentence in agreement_sentences(found):
        show(sentence)
    show(f"Figures: {(out / layout.AGREEMENT).absolute()}")


@with_groups
def rejudge(
    board: Annotated[Path, typer.Argument(help="folder of `otpo judge` or of a run, with its outputs")],
    out: Out,
    asked: JudgeOptions,
    task: Annotated[str | None, typer.Option("--task", help="which task, where the board has several")] = None,
) -> None:
    """The outputs of a board before another judge, by default by the same protocol: its own board, and what changes."""
    from jobs.rejudging import rejudge as judge_again
    from pipeline.lock.lock import one_writer

    asked.check()
    config = asked.config()
    with Bars(stderr) as bars, one_writer(out, otherwise=ANOTHER_OUT, progress=bars.show):
        found = judge_again(board, config, out, task=task, protocol=asked.protocol, progress=bars.show)
    from eval import layout
    from eval.board.judges import migration_sentences
    from eval.board.terminal import migration_table
    from pipeline.run.folder import RunFolder

    console.print(migration_table(found))
    for sentence in migration_sentences(found):
        show(sentence)
    show(f"Report: {RunFolder(out.absolute()).report}")
    show(f"Figures: {(out / layout.MIGRATION).absolute()}")


def report(
    folders: Annotated[list[Path], typer.Argument(help="run folders, or folders of `otpo judge`")], out: Out
) -> None:
    """One leaderboard and one page over any number of runs."""
    from eval.board.report import build
    from pipeline.lock.lock import one_writer

    with one_writer(out, otherwise=ANOTHER_OUT):
        show(f"Report: {build(folders, out).absolute()}")
