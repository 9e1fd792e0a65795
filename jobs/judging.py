"""`otpo judge`: any number of output files against one reference, into a folder of its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from eval import layout
from eval.judge.check import check
from eval.judge.config import JudgeConfig
from eval.outputs import load_outputs, match_outputs, with_inputs_of
from otpo.errors import UserError, WorkError
from otpo.files import Row
from pipeline.judge.board import make_board, write_judged
from pipeline.judge.judging import Judge, Match, judge_task
from pipeline.judge.reward_model import check_reward_model
from pipeline.progress import Progress
from pipeline.run.folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd


def judge_files(
    files: list[Path],
    reference: Path,
    config: JudgeConfig,
    out: Path,
    task: str,
    *,
    progress: Progress,
    subset: bool = False,
    template: str = "auto",
) -> pd.DataFrame:
    """Judge files, then write verdicts.parquet, leaderboard.csv and report.html to `out`.

    Args:
        template: how a reward model (`config.reward_model`) sees the instructions: auto, chat or literal.

    Returns:
        The leaderboard.

    Raises:
        UserError: files that do not fit together, or a judge that cannot be asked; nothing was asked.
        WorkError: not one verdict came back.
    """
    outputs, reference_rows = _read_files(files, load_outputs(reference), subset)
    if config.reward_model:
        check_reward_model("--reward-model", config.reward_model)
    else:
        check(config)
    judge = Judge(config, out / layout.STORE, template, progress)
    matches = [Match(name, reference.name, rows, reference_rows) for name, rows in outputs.items()]
    verdicts = judge_task(judge, matches, task, subset=subset)
    board = make_board(verdicts, outputs, reference_rows, config)
    write_judged(out, task, verdicts, board, outputs, reference_rows)
    if not verdicts["preference"].notna().any():
        raise WorkError(
            f"Not one verdict came back; {RunFolder(out).report} counts the failures. The same command asks again."
        )
    return board


def _read_files(files: list[Path], reference: list[Row], subset: bool) -> tuple[dict[str, list[Row]], list[Row]]:
    """Generator -> its outputs, and the reference's. A file without generators goes by its own name."""
    read = [load_outputs(file) for file in files]
    for rows in read:
        reference = with_inputs_of(rows, reference)
    outputs: dict[str, list[Row]] = {}
    for file, rows in zip(files, read, strict=True):
        match_outputs(rows, reference, subset=subset)
        names = Counter(str(row.get("generator") or file.name.split(".")[0]) for row in rows)
        name = names.most_common(1)[0][0]
        if name in outputs:
            raise UserError(f"Two files hold outputs of '{name}'. Give each file's rows a `generator` of its own.")
        outputs[name] = [{**row, "generator": name} for row in rows]
    return outputs, reference
