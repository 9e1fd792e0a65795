"""Numbers as a reader sees them, in the terminal and on the pages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd


def number(value: Any, digits: int = 1) -> str:
    """A number rounded to `digits` decimals, with a real minus sign; "n/a" for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or value is pd.NA:
        return "n/a"
    text = f"{value:,.{digits}f}"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text.replace("-", "\N{MINUS SIGN}")


def shown_rank(row: Mapping[Any, Any]) -> str:
    """The rank of a row of a leaderboard, with the worst that is possible: `2 to 4`, `1`, "n/a"."""
    best, worst = number(row["rank"], 0), number(row["rank_worst"], 0)
    return best if worst in (best, "n/a") else f"{best} to {worst}"


def signed(value: Any, digits: int = 1) -> str:
    """A difference with its sign; "n/a" for None and NaN."""
    text = number(value, digits)
    return f"+{text}" if text[0].isdigit() and float(text.replace(",", "")) > 0 else text


def points(value: float) -> str:
    """A difference of percentages: `3.0 points`."""
    return f"{number(value)} point" + ("" if number(value) == "1.0" else "s")


def count(n: float, noun: str) -> str:
    """`3 prompts`, `1 prompt`."""
    return f"{int(n):,} {noun}" + ("" if int(n) == 1 else "s")


def relative(ratio: float) -> str:
    """A ratio of lengths in words: `12% shorter than`, `2.3 times as long as`, `as long as`."""
    if round(ratio, 2) == 1:
        return "as long as"
    if ratio >= 2:
        return f"{ratio:.1f} times as long as"
    return f"{abs(ratio - 1) * 100:.0f}% {'longer' if ratio > 1 else 'shorter'} than"
