"""A task's leaderboard, made from its verdicts, for `otpo run`, `otpo sweep` and `otpo judge` alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval import layout
from eval.judge.config import JudgeConfig
from otpo.files import Row, write_json

if TYPE_CHECKING:
    import pandas as pd


def make_board(
    verdicts: pd.DataFrame, outputs: dict[str, list[Row]], reference: list[Row], config: JudgeConfig, *, seed: int = 0
) -> pd.DataFrame:
    """The board of one task: the models against the reference, then those that were judged against each other.

    Args:
        verdicts: as `judge_task` gives them, of one task.
        outputs: label -> its outputs.
        reference: the outputs that the models were compared with.
        config: the judge that was asked.
        seed: of the bootstrap intervals.

    Returns:
        Columns as `eval.board.leaderboard.COLUMNS`, a row a model and opponent.

    Raises:
        UserError: calibration files that cannot be used, or verdicts about outputs that are not given.
    """
    import pandas as pd

    from eval.board.leaderboard import leaderboard
    from eval.judge.panels.members import judge_label
    from eval.judge.protocols.registry import protocol_label

    references = {str(row.get("generator") or "reference") for row in reference}
    opponents = set(outputs) - references
    against = verdicts["reference"].where(verdicts["reference"].isin(opponents), "")
    boards = [
        leaderboard(
            frame,
            outputs,
            outputs[str(opponent)] if opponent else reference,
            judge=judge_label(config),
            protocol=protocol_label(config.protocol),
            calibration=Path(config.calibration) if config.calibration else None,
            seed=seed,
        )
        for opponent, frame in verdicts.groupby(against, sort=False)
    ]
    return pd.concat(boards, ignore_index=True)


def write_judged(
    folder: Path,
    task: str,
    verdicts: pd.DataFrame,
    board: pd.DataFrame,
    outputs: dict[str, list[Row]],
    reference: list[Row],
) -> None:
    """Write a folder that holds one judged task at its top: verdicts, leaderboard, the outputs, and the page.

    Args:
        outputs: those that do not lie in the folder yet.
    """
    from eval.board.leaderboard import write_leaderboard
    from eval.board.report import build
    from eval.board.run_files import write_outputs
    from eval.judge.table import write_verdicts

    write_verdicts(verdicts, folder / layout.VERDICTS)
    write_outputs(folder, task, outputs, reference)
    write_leaderboard(board, folder / layout.LEADERBOARD)
    build([folder], folder)


def write_panel(folder: Path, said: Mapping[str, list[pd.DataFrame]], verdicts: pd.DataFrame) -> dict[str, Any]:
    """Write what each judge of a panel said, and how far they agree, beside the panel's own verdicts.

    Args:
        folder: where panel.json and, in panel/, a table of verdicts for each judge go.
        said: judge of the panel -> its verdicts, as `Judge.members` has them.
        verdicts: the panel's.

    Returns:
        What panel.json holds (`eval.stats.judges.panel_agreement`).
    """
    import pandas as pd

    from eval.judge.table import write_verdicts
    from eval.stats.judges import panel_agreement

    members = {name: pd.concat(frames, ignore_index=True) for name, frames in said.items()}
    for name, own in members.items():
        write_verdicts(own, folder / layout.PANEL / f"{layout.folder_name(name)}.parquet")
    found = panel_agreement(members, verdicts)
    write_json(folder / layout.PANEL_FIGURES, found)
    return found
