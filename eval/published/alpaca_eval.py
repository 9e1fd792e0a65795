"""AlpacaEval 2's published leaderboard as rows of a board: figures without verdicts of ours."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pandas as pd

from eval.board.leaderboard import ALPACA_EVAL_COLUMNS, COLUMNS, OFFICIAL_JUDGE
from eval.stats.length_control import OFFICIAL_REFERENCE
from otpo.errors import UserError, first_line

PROTOCOL, TASK = "alpaca_eval", "alpaca_eval"
_FIGURES = ALPACA_EVAL_COLUMNS[1:]


def read_published(path: Path) -> pd.DataFrame:
    """The rows of AlpacaEval 2's leaderboard: `name` and AlpacaEval's columns.

    Raises:
        UserError: no such file; its columns are others; a name stands twice; or its reference is not AlpacaEval 2's.
    """
    try:
        frame = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype={0: str})
    except FileNotFoundError:
        raise UserError(f"expected AlpacaEval's leaderboard (CSV) at {path}, found nothing there.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not CSV: {first_line(error)}") from None
    frame = frame.rename(columns={frame.columns[0]: "name"})
    if missing := [column for column in _FIGURES if column not in frame]:
        raise UserError(
            f"{path}: expected the columns of AlpacaEval 2's leaderboard, with the models' names in the first one; "
            f"missing {', '.join(missing)}. Its repository has them as weighted_alpaca_eval_gpt4_turbo_leaderboard.csv."
        )
    frame = frame[list(ALPACA_EVAL_COLUMNS)]
    for column in _FIGURES:
        frame[column] = pd.to_numeric(frame[column], errors="coerce")
    if (unreadable := frame["name"].isna() | frame["win_rate"].isna() | frame["n_total"].isna()).any():
        raise UserError(f"{path}: {unreadable.sum()} rows lack a name, win_rate or n_total: correct or remove them.")
    if (twice := frame["name"].duplicated()).any():
        raise UserError(f"{path}: '{frame['name'][twice].iloc[0]}' stands twice: keep one row of each model.")
    itself = frame["name"][(frame["n_draws"] == frame["n_total"]) & (frame["n_total"] > 0)]
    if len(itself) and OFFICIAL_REFERENCE not in set(itself):
        raise UserError(
            f"{path}: its models were compared with {itself.iloc[0]}, not with AlpacaEval 2's {OFFICIAL_REFERENCE}."
        )
    return frame.reset_index(drop=True)


def published_rows(
    frame: pd.DataFrame, *, judge: str = OFFICIAL_JUDGE, task: str = TASK, file: str, taken: Collection[str] = ()
) -> pd.DataFrame:
    """The rows as a board has them, marked as imported.

    Args:
        frame: as `read_published` gives it.
        judge: who gave the verdicts.
        task: the board's.
        file: what `imported` says.
        taken: names that other rows of the board have; these get "(published)" behind them.

    Returns:
        A table with `eval.board.leaderboard.COLUMNS`.
    """
    rows = frame.reindex(columns=list(COLUMNS)).astype(object)
    rows["name"] = [f"{name} (published)" if name in taken else name for name in frame["name"]]
    rows[["task", "judge", "protocol", "reference", "orders"]] = [task, judge, PROTOCOL, OFFICIAL_REFERENCE, "one"]
    rows["imported"], rows["n_failed"] = file, 0
    rows[["note", "read"]] = ""
    for column in ("n_wins", "n_wins_base", "n_draws", "n_total"):
        rows[column] = frame[column].fillna(0).astype(int)
    return rows
