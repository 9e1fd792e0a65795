"""A leaderboard, and a judge's agreement with people, in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from eval.board.judges import AGREEMENT_HEADINGS, agreement_rows, judges_named
from eval.board.numbers import number, shown_rank

if TYPE_CHECKING:
    from rich.table import Table


def terminal_table(board: pd.DataFrame, title: str | None = None) -> Table:
    """A leaderboard as a table for the terminal: how good, how sure, how long, and what failed."""
    from rich.markup import escape
    from rich.table import Table

    controlled = board["length_controlled_winrate"].notna().any()
    # Leave out a column that is the same in every row.
    context = [name for name in ("task", "reference") if board[name].nunique() > 1]
    ranked = board["rank"].notna().any() and len(board) > 1
    table = Table(title=title, title_justify="left")
    for heading in ["model", *context]:
        table.add_column(heading)
    level = "length-controlled" if controlled else "length-adjusted"
    for heading in [
        *(["rank"] if ranked else []),
        "win rate",
        "95% interval",
        level,
        "wins/ties/losses",
        "characters",
        "x reference",
        "failed",
    ]:
        table.add_column(heading, justify="right")
    for _, rows in board.groupby("task", sort=False):
        for row in rows.to_dict("records"):
            table.add_row(
                *(escape(str(row[name])) for name in ("name", *context)),  # a name may hold what rich takes for markup
                *([shown_rank(row)] if ranked else []),
                number(row["win_rate"]),
                f"{number(row['win_rate_low'])} to {number(row['win_rate_high'])}",
                number(row["length_controlled_winrate"]) if controlled else _adjusted(row),
                f"{row['n_wins']}/{row['n_draws']}/{row['n_wins_base']}",
                number(row["avg_length"], 0),
                number(row["length_ratio"], 2),
                str(row["n_failed"]),
            )
        table.add_section()
    return table


def terminal_notes(board: pd.DataFrame) -> list[str]:
    """What to know about the rows of a leaderboard, a line each."""
    several = board["task"].nunique() > 1
    rows = [row for row in board.to_dict("records") if row["note"]]
    return [f"{row['name']}{' on ' + str(row['task']) if several else ''}: {row['note']}." for row in rows]


def agreement_table(figures: Mapping[str, Any]) -> Table:
    """The figures of agreement.json, a row for all pairs and one for each category."""
    from rich.table import Table

    table = Table(title=f"{figures['judge']} and people, protocol {figures['protocol']}", title_justify="left")
    first, *others = AGREEMENT_HEADINGS
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    for row in agreement_rows(figures):
        table.add_row(*row)
    return table


def _adjusted(row: dict[Any, Any]) -> str:
    """The length-adjusted win rate with its interval, which is wide where it extrapolates."""
    estimate = number(row["length_adjusted_winrate"])
    if pd.isna(row["length_adjusted_low"]):
        return estimate
    return f"{estimate} ({number(row['length_adjusted_low'])} to {number(row['length_adjusted_high'])})"


def migration_table(figures: Mapping[str, Any]) -> Table:
    """The models of a board before two judges, as a table for the terminal."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=", then ".join(judges_named(figures)), title_justify="left")
    table.add_column("model")
    for heading in ("rank", "win rate, old", "win rate, new", "difference", "95% interval", "same winner", "prompts"):
        table.add_column(heading, justify="right")
    for row in figures["models"]:
        same = None if row["agreement"] is None else 100 * row["agreement"]
        table.add_row(
            escape(row["name"]), f"{row['old_rank']} to {row['new_rank']}",
            *(number(row[key]) for key in ("old_win_rate", "new_win_rate", "difference")),
            f"{number(row['low'])} to {number(row['high'])}", f"{number(same)}%", f"{row['n']:,}",
        )  # fmt: skip
    return table
