"""`otpo judge`: any number of output files against one reference, into a folder of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from eval import layout
from eval.board.judges import panel_sentences
from eval.judge.check import check_each
from eval.judge.config import JudgeConfig
from eval.judge.panels.members import judge_label
from eval.judge.table import several_models
from eval.outputs.columns import check_used
from eval.outputs.matching import JUDGED, match_outputs, with_inputs_of, with_instructions_of
from eval.outputs.reading import OutputFile, read_outputs, whole_text
from jobs.batching import Asked, estimate, read_batch, tell_used
from otpo.errors import UserError, WorkError
from otpo.files import Row
from pipeline.judge.board import make_board, write_judged, write_panel
from pipeline.judge.judging import Judge, judge_task
from pipeline.judge.reward_model import check_reward_model
from pipeline.judge.served import served
from pipeline.progress import Progress
from pipeline.run.folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd

    from eval.judge.offline.batch_files import BatchReplies


def judge_files(
    files: Sequence[str],
    reference: Path,
    config: JudgeConfig,
    out: Path,
    task: str,
    *,
    progress: Progress,
    subset: bool = False,
    template: str = "auto",
    batch: Sequence[Path] = (),
) -> pd.DataFrame:
    """Judge files, then write verdicts.parquet, leaderboard.csv and report.html to `out`.

    Args:
        files: of outputs, each a path or NAME=FILE, which makes the file one model of that name.
        template: how a reward model (`config.reward_model`) sees the instructions: auto, chat or literal.
        batch: files of replies, which then answer in place of the endpoint.

    Returns:
        The leaderboard.

    Raises:
        UserError: files that do not fit together, or a judge that cannot be asked; nothing was asked.
        WorkError: not one verdict came back.
    """
    task = whole_text(task)
    outputs, reference_rows = read_files(files, reference, config, subset, progress)
    asked = Asked(outputs, reference_rows, config, out, task, reference.name, subset)
    replies = read_batch(batch, config, out, progress) if batch else None
    judge, verdicts = ask(asked, progress=progress, template=template, replies=replies)
    board = make_board(verdicts, outputs, reference_rows, config)
    tell_panel(out, judge.members, verdicts, config, progress)
    write_judged(out, task, verdicts, board, outputs, reference_rows)
    tell_missing(verdicts, config, out, progress)
    return board


def ask(
    asked: Asked, *, progress: Progress, template: str = "auto", replies: BatchReplies | None = None
) -> tuple[Judge, pd.DataFrame]:
    """The judge, and its verdicts on every model's outputs; what the store has is not asked again.

    Args:
        asked: who is asked about what.
        progress: told what happens.
        template: how a reward model sees the instructions, as `judge_files` takes it.
        replies: of a batch, which answer in place of the endpoint.

    Raises:
        UserError: the judge cannot be asked; nothing was asked.
    """
    store = asked.out / layout.STORE
    if asked.config.protocol.startswith("mt_bench") and not any(row.get("turn") for row in asked.reference):
        progress(asked.config.protocol, 0, 0, "the outputs have one turn each, so only that is judged")
    with served(asked.config, progress) if replies is None else nullcontext(asked.config) as config:
        if config.reward_model:
            check_reward_model("--reward-model", config.reward_model)
        elif replies is None:
            for model, way in check_each(config, store):
                progress(f"judge {model}", 0, 0, str(way))
            if config.price_input or config.price_output:
                progress(f"judge {config.model}", 0, 0, str(estimate(replace(asked, config=config))))
        judge = Judge(config, store, template, progress, answer=replies)
        verdicts = judge_task(judge, asked.matches, asked.task, subset=asked.subset)
    if replies is not None:
        tell_used(replies, progress)
    return judge, verdicts


def tell_panel(
    out: Path,
    members: Mapping[str, list[pd.DataFrame]],
    verdicts: pd.DataFrame,
    config: JudgeConfig,
    progress: Progress,
) -> None:
    """Write how far the judges of a panel agree, and say it; nothing where one judges alone."""
    if config.panel:
        for sentence in panel_sentences(write_panel(out, members, verdicts)):
            progress("panel", 0, 0, sentence)


def tell_missing(verdicts: pd.DataFrame, config: JudgeConfig, out: Path, progress: Progress) -> None:
    """Say which verdicts did not come back, and that a judge's name answers as several models.

    Raises:
        WorkError: not one verdict came back.
    """
    if not verdicts["preference"].notna().any():
        raise WorkError(
            f"Not one verdict came back{most_frequent(verdicts)}; {RunFolder(out).report} counts the failures. The "
            "same command asks again."
        )
    if changed := several_models(verdicts):
        progress(f"judge {judge_label(config)}", 0, 0, changed)
    missing = verdicts[verdicts["preference"].isna()]
    if len(missing):
        counted = f"{len(missing)} of {len(verdicts)} verdicts failed{most_frequent(missing)}"
        what = f"judge {judge_label(config)}"
        progress(what, 0, 0, f"{counted}. The board counts them, and the same command asks for them again.")


def most_frequent(verdicts: pd.DataFrame) -> str:
    """The most frequent failure, in the endpoint's or the judge's own words."""
    said = verdicts[["error", "detail"]].fillna("").value_counts()
    if not len(said):
        return ""
    kind, detail = said.index[0]
    return f" ({int(said.iloc[0])} x {kind}{': ' + detail if detail else ''})"


def read_files(
    files: Sequence[str], reference: Path, config: JudgeConfig, subset: bool, progress: Progress
) -> tuple[dict[str, list[Row]], list[Row]]:
    """Generator -> its outputs, and the reference's rows. A file without generators goes by its own name.

    Raises:
        UserError: files that cannot be read, or do not fit together.
    """
    theirs = read_outputs(reference, config.columns, reference=True, count_missing=config.count_missing)
    return read_models(files, theirs, config, subset, progress)[:2]


def read_models(
    files: Sequence[str],
    theirs: OutputFile,
    config: JudgeConfig,
    subset: bool,
    progress: Progress,
    otherwise: str = JUDGED,
) -> tuple[dict[str, list[Row]], list[Row], dict[str, Path]]:
    """`read_files` with a reference that is read already; also which file each generator's outputs are from."""
    columns = config.columns
    named = [named_file(asked) for asked in files]
    read = [read_outputs(path, columns, count_missing=config.count_missing) for _, path in named]
    check_used(columns, [each.columns for each in (theirs, *read)])
    for file in (theirs, *read):
        for remark in file.said:
            progress(str(file.path), 0, 0, remark)
    against = theirs.rows
    for file in read:
        against = with_inputs_of(file.rows, against)
    outputs: dict[str, list[Row]] = {}
    sources: dict[str, Path] = {}
    for (wanted, path), file in zip(named, read, strict=True):
        rows, changed = with_instructions_of(file.rows, against)
        if changed:
            what = "instructions that differ from the reference's in white space or Unicode form alone are matched"
            progress(str(path), 0, 0, f"{changed} {what}")
        for name, own in _models(rows, file, wanted).items():
            match_outputs(own, against, subset=subset, owner=f"'{name:.60}' in {path}", otherwise=otherwise)
            if name in outputs:
                raise UserError(f"Two files hold outputs of '{name}'. Name the models: NAME=FILE, as in one={path}.")
            outputs[name], sources[name] = [{**row, "generator": name} for row in own], path
    return outputs, against, sources


def named_file(asked: str) -> tuple[str | None, Path]:
    """NAME=FILE as the two, without a name where it is the path of a file. Either may have `=` in it."""
    if "=" not in asked or Path(asked).expanduser().is_file():
        return None, Path(asked)
    parts = asked.split("=")
    ways = [("=".join(parts[:n]), "=".join(parts[n:])) for n in range(1, len(parts))]
    name, path = next((way for way in ways if Path(way[1]).expanduser().is_file()), ways[0])
    if not (name.strip() and path):
        raise UserError(f"{asked}: expected the path of a file, or NAME=FILE")
    return whole_text(name), Path(path)


def _models(rows: list[Row], file: OutputFile, name: str | None) -> dict[str, list[Row]]:
    """The models of a file: all rows are of the one that is named, or each `generator` is one.

    A file with more rows than instructions for one model would otherwise give one model the outputs of another.
    """
    if name:
        return {name: rows}
    models: dict[str, list[Row]] = {}
    for row in rows:
        models.setdefault(row.get("generator") or file.stem, []).append(row)
    return models
