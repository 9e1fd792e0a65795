"""Verbs about outputs that are there: judge, agreement, report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli.options import ANOTHER_OUT, Out
from jobs.cli.options.judge import BoardOptions, JudgeOptions, with_groups
from jobs.cli.progress import Bars
from jobs.cli.terminal import console, say, show, stderr
from otpo.errors import UserError

if TYPE_CHECKING:
    from eval.judge.config import JudgeConfig
    from pipeline.progress import Progress


@with_groups
def judge(
    outputs: Annotated[
        list[str],
        typer.Argument(help="files of outputs, as model_outputs.json; NAME=FILE makes the file one model of that name"),
    ],
    reference: Annotated[Path, typer.Option("--reference", help="outputs of the baseline, in a file of the same kind")],
    out: Out,
    asked: BoardOptions,
    subset: Annotated[
        bool, typer.Option("--subset", help="the outputs cover only a part of the reference's instructions")
    ] = False,
    batch_write: Annotated[
        Path | None,
        typer.Option("--batch-write", help="write the questions to a batch file in OpenAI's format, and ask nothing"),
    ] = None,
    batch_read: Annotated[
        list[Path] | None,
        typer.Option("--batch-read", show_default=False, help="take replies from a batch's files, and ask nothing"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say how many calls there would be and their price, and ask nothing")
    ] = False,
) -> None:
    """Verdicts, win rates and lengths of outputs against a reference."""
    from jobs.judging import judge_files
    from pipeline.lock.lock import one_writer

    offline = [option for option, given in (
        ("--batch-write", batch_write), ("--batch-read", batch_read), ("--dry-run", dry_run),
    ) if given]  # fmt: skip
    own = [
        option
        for option, given in (("--reward-model", asked.reward_model), ("--judge-vllm", asked.judge_vllm))
        if given
    ]
    if len(offline) > 1 or (offline and own):
        raise UserError(f"{' and '.join(offline + own)}: keep one.")
    if not offline:
        asked.check("--reward-model", asked.reward_model)
    config = asked.config()
    if batch_write or dry_run:
        with Bars(stderr) as bars, one_writer(out, otherwise=ANOTHER_OUT, progress=bars.show):
            _without_calls(outputs, reference, config, out, asked.task, batch_write, subset, bars.show)
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
            batch=batch_read or (),
        )
    from eval.board.terminal import terminal_notes, terminal_table
    from pipeline.run.folder import RunFolder

    console.print(terminal_table(board))
    for note in terminal_notes(board):
        show(note)
    show(f"Report: {RunFolder(out.absolute()).report}")


def _without_calls(
    files: list[str],
    reference: Path,
    config: JudgeConfig,
    out: Path,
    task: str,
    batch: Path | None,
    subset: bool,
    progress: Progress,
) -> None:
    """Write a batch file, or say what judging would cost."""
    from jobs.batching import Asked, estimate, know_the_way, write_batch
    from jobs.judging import read_files

    rows, theirs = read_files(files, reference, config, subset, progress)
    know_the_way(config, out, progress, ask=batch is not None)
    asked = Asked(rows, theirs, config, out, task, reference.name, subset)
    if batch is None:
        show(str(estimate(asked)))
        return
    written, cost = write_batch(batch, asked)
    if not written.requests:
        show("Every question has its reply; there is nothing to write.")
        return
    show(f"{written.requests:,} requests in {', '.join(map(str, written.files))}")
    show(str(cost))
    show("Hand them in; then run the same command with --batch-read and the files that come back.")


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
