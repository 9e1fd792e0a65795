"""Verdicts other than a letter: grades in double brackets, and what JSON says of each criterion."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from eval.judge.protocols.protocol import Criterion, Grade
from eval.judge.reading.text import WRAPPING

_BRACKETS = re.compile(r"\[\[\s*([^\[\]\n]{1,20}?)\s*\]\]")
_NUMBER = re.compile(r"10(?:\.0+)?|[1-9](?:\.\d+)?")
_FENCE = re.compile(r"```(?:json)?\s*(\{.*\})\s*```", re.DOTALL | re.IGNORECASE)
_TRUTHS = {"true": True, "yes": True, "false": False, "no": False}


def spoken_grade(text: str, grades: Sequence[Grade]) -> Grade | None:
    """The grade that a text without thinking gives: its last one in double brackets, else all that it says.

    What stands in the last double brackets must be a grade: a judge that ends otherwise has given none.
    """
    known = {grade.said: grade for grade in grades}
    found, shown = object_in(text), _BRACKETS.findall(text)
    # A judge that answers for itself first may write JSON there: beside brackets, JSON counts where it is the whole.
    if found is not None and (not shown or not _FENCE.sub("", text).strip() or text.startswith("{")):
        said = [value for key, value in found.items() if str(key).lower() == "verdict"]
        return known.get(_bare(said[0])) if len(said) == 1 and isinstance(said[0], str) else None
    return known.get(_bare(shown[-1] if shown else text))


def bracketed_rating(text: str) -> float | None:
    """The number from 1 to 10 in a text's last double brackets; None where there is none."""
    shown = _BRACKETS.findall(text)
    return float(shown[-1]) if shown and _NUMBER.fullmatch(shown[-1]) else None


def read_criteria(text: str, criteria: Sequence[Criterion]) -> dict[str, bool | int] | None:
    """What a JSON object says of each criterion; None where one is missing, or is said twice, or is off its scale."""
    found = object_in(text)
    if found is None:
        return None
    said = ((each.name, _value(found.get(each.name), each.points)) for each in criteria)
    values = {name: value for name, value in said if value is not None}
    return values if len(values) == len(criteria) else None


def score_of(values: dict[str, bool | int], criteria: Sequence[Criterion]) -> float:
    """The weighted mean of what was given, in percent: 0 is the least of every criterion, 100 the most."""
    parts = {
        each.name: float(values[each.name]) if each.points is None else (values[each.name] - 1) / (each.points - 1)
        for each in criteria
    }
    return 100 * sum(each.weight * parts[each.name] for each in criteria) / sum(each.weight for each in criteria)


def object_in(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, or that its last fence holds; None where there is none, or a key stands twice."""
    fenced = None if text.lstrip().startswith("{") else _FENCE.search(text)
    try:
        found = json.loads(fenced[1] if fenced else text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _value(value: Any, points: int | None) -> bool | int | None:
    if isinstance(value, str):
        value = _TRUTHS.get(value.strip().lower(), int(value) if value.strip().isdecimal() else None)
    if points is None:
        return value if isinstance(value, bool) else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 1 <= value <= points else None


def _bare(text: str) -> str:
    return "".join(text.strip(WRAPPING).split())
