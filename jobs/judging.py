"""`otpo judge`: any number of output files against one reference, into a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eval import layout
from eval.judge.check import check
from eval.judge.config import JudgeConfig
from eval.outputs import load_outputs, match_outputs, with_inputs_of, with_instructions_of
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
    names: Sequence[str] = (),
) -> pd.DataFrame:
    """Judge files, then write verdicts.parquet, leaderboard.csv and report.html to `out`.

    Args:
        template: how a reward model (`config.reward_model`) sees the instructions: auto, chat or literal.
        names: of the models, in the order of the files, in place of those that the files give them.

    Returns:
        The leaderboard.

    Raises:
        UserError: files that do not fit together, or a judge that cannot be asked; nothing was asked.
        WorkError: not one verdict came back.
    """
    outputs, reference_rows = _read_files(files, load_outputs(reference), subset, names, progress)
    if config.reward_model:
        check_reward_model("--reward-model", config.reward_model)
    else:
        progress(f"judge {config.model}", 0, 0, str(check(config, out / layout.STORE)))
    judge = Judge(config, out / layout.STORE, template, progress)
    matches = [Match(name, reference.name, rows, reference_rows) for name, rows in outputs.items()]
    verdicts = judge_task(judge, matches, task, subset=subset)
    board = make_board(verdicts, outputs, reference_rows, config)
    write_judged(out, task, verdicts, board, outputs, reference_rows)
    if not verdicts["preference"].notna().any():
        raise WorkError(
            f"Not one verdict came back{most_frequent(verdicts)}; {RunFolder(out).report} counts the failures. The "
            "same command asks again."
        )
    missing = verdicts[verdicts["preference"].isna()]
    if len(missing):
        counted = f"{len(missing)} of {len(verdicts)} verdicts failed{most_frequent(missing)}"
        what = f"judge {config.model}"
        progress(what, 0, 0, f"{counted}. The board counts them, and the same command asks for them again.")
    return board


def most_frequent(verdicts: pd.DataFrame) -> str:
    """The most frequent failure, in the endpoint's or the judge's own words."""
    said = verdicts[["error", "detail"]].fillna("").value_counts()
    if not len(said):
        return ""
    kind, detail = said.index[0]
    return f" ({int(said.iloc[0])} x {kind}{': ' + detail if detail else ''})"


def _read_files(
    files: list[Path], reference: list[Row], subset: bool, names: Sequence[str], progress: Progress
) -> tuple[dict[str, list[Row]], list[Row]]:
    """Generator -> its outputs, and the reference's. A file without generators goes by its own name."""
    if names and len(names) != len(files):
        raise UserError(f"expected a --name for each of the {len(files)} files, in their order; found {len(names)}.")
    given: Sequence[str | None] = names or [None] * len(files)
    read = [load_outputs(file) for file in files]
    for rows in read:
        reference = with_inputs_of(rows, reference)
    outputs: dict[str, list[Row]] = {}
    for file, rows, wanted in zip(files, read, given, strict=True):
        rows, changed = with_instructions_of(rows, reference)
        if changed:
            what = "instructions that differ from the reference's in white space or Unicode form alone are matched"
            progress(str(file), 0, 0, f"{changed} {what}")
        for name, own in _models(rows, file, wanted).items():
            match_outputs(own, reference, subset=subset)
            if name in outputs:
                raise UserError(
                    f"Two files hold outputs of '{name}'. Name each model by --name, once for each file, in order."
                )
            outputs[name] = [{**row, "generator": name} for row in own]
    return outputs, reference


def _models(rows: list[Row], file: Path, name: str | None) -> dict[str, list[Row]]:
    """The models of a file: all rows are of the one that is named, or each `generator` is one.

    A file with more rows than instructions for one model would otherwise give one model the outputs of another.
    """
    if name:
        return {name: rows}
    models: dict[str, list[Row]] = {}
    for row in rows:
        models.setdefault(str(row.get("generator") or file.name.split(".")[0]), []).append(row)
    return models
