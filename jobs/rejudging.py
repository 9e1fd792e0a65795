"""`otpo rejudge`: the outputs of a board before another judge, and what that changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import layout
from eval.board.run_files import RunFiles, of_task, read_run
from eval.judge.config import JudgeConfig
from eval.judge.panels.members import judge_label
from eval.judge.protocols.registry import PROTOCOLS, protocol_label
from eval.stats.judges import migration
from jobs.batching import Asked
from jobs.judging import ask
from otpo.errors import UserError, WorkError
from otpo.files import Row, write_json
from pipeline.judge.board import make_board, write_judged, write_panel
from pipeline.judge.judging import Judge
from pipeline.progress import Progress

if TYPE_CHECKING:
    import pandas as pd

    from eval.judge.offline.batch_files import BatchReplies


@dataclass(frozen=True)
class Judged:
    """What a folder holds of a task that was judged.

    Attributes:
        task: its name.
        outputs: model -> its outputs.
        reference: the reference's rows.
        against: the reference's name.
        verdicts: on those models against it.
        judge, protocol: who gave them, and how it was asked, as the board says.
    """

    task: str
    outputs: dict[str, list[Row]]
    reference: list[Row]
    against: str
    verdicts: pd.DataFrame
    judge: str
    protocol: str

    @property
    def both_orders(self) -> bool:
        """Whether pairs were asked twice."""
        return bool(self.verdicts.duplicated(["generator", "index"]).any())


def rejudge(
    folder: Path, config: JudgeConfig, out: Path, *, task: str | None, protocol: str | None, progress: Progress
) -> dict[str, Any]:
    """Judge what a board holds with another judge; write its board, and migration.json, to `out`.

    Args:
        folder: of `otpo judge` or of a run.
        config: the new judge. It is asked in as many orders as the old one was, and by the same protocol.
        out: another folder.
        task: which of the board's tasks, where it has several.
        protocol: in place of the old judge's.
        progress: told what happens.

    Returns:
        What migration.json holds: `eval.stats.judges.migration`, with task, old_judge, new_judge, old_protocol and
        new_protocol.

    Raises:
        UserError: a folder without verdicts or outputs, or a judge that cannot be asked; nothing was asked.
        WorkError: not one verdict came back.
    """
    if out.resolve() == folder.resolve():
        raise UserError(f"{out} is the board that is judged again: name another folder with --out.")
    old = judged(folder, task)
    wanted = protocol or _same(old.protocol, folder)
    config = config.model_copy(update={"protocol": wanted, "both_orders": old.both_orders})
    asked, new, found = ask_again(old, config, out, progress=progress)
    if config.panel:
        write_panel(out, asked.members, new)
    write_judged(out, old.task, new, make_board(new, old.outputs, old.reference, config), old.outputs, old.reference)
    write_json(out / layout.MIGRATION, found)
    return found


def judged(folder: Path, task: str | None) -> Judged:
    """What a board holds of a task, where models were judged against one reference.

    Raises:
        UserError: a folder without verdicts or outputs, or with several tasks where none is named.
    """
    run = read_run(folder)
    name = _task_of(run, task, folder)
    outputs, reference = of_task(run.outputs, name) or {}, of_task(run.references, name) or []
    against = str(reference[0].get("generator") or "reference") if reference else ""
    old = run.verdicts[name]
    old = old[(old["reference"] == against) & old["generator"].isin(outputs)]
    if old.empty:
        raise UserError(
            f"{folder}: expected outputs of the models and of the reference ({layout.OUTPUTS}), found none."
        )
    own = {label: outputs[label] for label in dict.fromkeys(old["generator"])}
    return Judged(name, own, reference, against, old, *_judge_of(run, name, against))


def ask_again(
    old: Judged,
    config: JudgeConfig,
    out: Path,
    *,
    progress: Progress,
    template: str = "auto",
    replies: BatchReplies | None = None,
) -> tuple[Judge, pd.DataFrame, dict[str, Any]]:
    """The new judge, its verdicts on what was judged before, and the figures of migration.json.

    Args:
        old: what was judged.
        config: the new judge, as it is to be asked.
        out: the folder with its store.
        template, replies: as `jobs.judging.ask` takes them.

    Raises:
        UserError: the judge cannot be asked; nothing was asked. WorkError: not one verdict came back.
    """
    asked = Asked(old.outputs, old.reference, config, out, old.task, old.against, subset=True)
    judge, new = ask(asked, progress=progress, template=template, replies=replies)
    if not new["preference"].notna().any():
        raise WorkError("Not one verdict came back. The same command asks again.")
    found = {
        "task": old.task, "old_judge": old.judge, "new_judge": judge_label(config), "old_protocol": old.protocol,
        "new_protocol": protocol_label(config.protocol), **migration(old.verdicts, new),
    }  # fmt: skip
    return judge, new, found


def _task_of(run: RunFiles, task: str | None, folder: Path) -> str:
    known = list(run.verdicts)
    if not known:
        raise UserError(f"{folder}: expected a board with its verdicts ({layout.VERDICTS}), found none.")
    if task is None and len(known) > 1:
        raise UserError(f"{folder} has the tasks {', '.join(known)}: say which one with --task.")
    if task is not None and task not in known:
        raise UserError(f"--task {task}: {folder} has {', '.join(known)}.")
    return task or known[0]


def _judge_of(run: RunFiles, task: str, reference: str) -> tuple[str, str]:
    """Who judged a board, and by which protocol."""
    board: pd.DataFrame | None = run.board
    rows = board[(board["task"] == task) & (board["reference"] == reference)] if board is not None else None
    if rows is None or rows.empty:
        return "an unknown judge", ""
    return str(rows["judge"].iloc[0]), str(rows["protocol"].iloc[0])


def _same(protocol: str, folder: Path) -> str:
    if protocol not in PROTOCOLS:
        raise UserError(
            f"{folder} was judged by the protocol '{protocol}': say how to ask the new judge with --protocol."
        )
    return protocol
