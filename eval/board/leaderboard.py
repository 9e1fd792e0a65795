"""The leaderboard: one row a model and task. AlpacaEval's columns come first, ours after them."""

from __future__ import annotations

import csv
import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from eval.board.numbers import number, shown_rank
from eval.board.standings import MISSING_COLUMNS, RANK_COLUMNS, standings_of, with_bounds, with_ranks
from eval.outputs.matching import length_of, rows_of_prompts
from eval.stats.intervals import win_rate_interval
from eval.stats.length_control import (
    OFFICIAL_REFERENCE,
    Calibration,
    length_adjusted,
    length_controlled,
    load_calibration,
    why_not_official,
)
from eval.stats.position_bias import bias_note, position_bias
from eval.stats.scores import scores
from eval.stats.verbosity import gain_from_length, verbosity
from eval.stats.win_rate import by_prompt, win_rates
from eval.stats.wording import BUCKETS, win_rates_by_length, wording
from otpo.errors import UserError
from otpo.files import replacing, write_atomically

ALPACA_EVAL_COLUMNS = (
    *("name", "win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total", "discrete_win_rate"),
    *("avg_length", "length_controlled_winrate", "lc_standard_error"),
)
CONTEXT_COLUMNS = ("task", "judge", "protocol", "reference")
OWN_COLUMNS = (
    *RANK_COLUMNS,
    *("win_rate_low", "win_rate_high", "n_failed"),
    *MISSING_COLUMNS,
    *("length_adjusted_winrate", "length_adjusted_low", "length_adjusted_high", "gain_from_length"),
    *("score", "score_low", "score_high", "reference_score"),
    *("style_controlled", "style_controlled_low", "style_controlled_high", "orders"),
    *("reference_length", "length_ratio", "avg_tokens", "longer_share", "wins_when_longer"),
    *("win_rate_when_longer", "win_rate_when_shorter", "truncation_rate", "flip_rate"),
    *("avg_sentences", "avg_list_items", "compression_ratio", "copy_rate"),
    *(f"{figure}_ratio_{name}" for *_, name in BUCKETS for figure in ("win_rate", "n")),
    *("first_share", "first_share_low", "first_share_high", "win_rate_shown_first", "win_rate_shown_second"),
    "read",
    *("judge_prompt_tokens", "judge_completion_tokens", "judge_price_usd", "imported", "note"),
)
COLUMNS = (*ALPACA_EVAL_COLUMNS, *CONTEXT_COLUMNS, *OWN_COLUMNS)
SUMMARIES = ("summary", "tldr")
OFFICIAL_JUDGE = "gpt-4-1106-preview"
# Percent of outputs shorter (or longer) than the reference's below which "equal length" is an extrapolation.
EXTRAPOLATION_SHARE = 10.0

Rows = Sequence[Mapping[str, Any]]


def leaderboard(
    verdicts: pd.DataFrame,
    outputs: Mapping[str, Rows],
    reference: Rows,
    *,
    judge: str,
    protocol: str,
    calibration: Path | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """The leaderboard of one task, best win rate first.

    Args:
        verdicts: one row a verdict (columns of verdicts.parquet), of one task and reference.
        outputs: model label (`generator` in `verdicts`) -> rows of its model_outputs.json. A row without an output
            (None) is in no length.
        reference: rows of the reference's model_outputs.json.
        judge: name of the judge model.
        protocol: how the judge was asked (`eval.judge.protocols`), or "reward".
        calibration: folder of AlpacaEval's calibration files; used only if the reference is the one they belong to.
        seed: of the bootstrap of the length-adjusted win rate.

    Returns:
        A table with COLUMNS, and for criteria a column of each. Rates and shares are percentages. Only one of
        length_controlled_winrate (AlpacaEval's definition) and length_adjusted_winrate (ours) is filled. `note` says
        what to know about the row.

    Raises:
        UserError: unusable calibration files, or verdicts about outputs that `outputs` or `reference` do not have.
    """
    prompts = by_prompt(verdicts)
    loaded = load_calibration(Path(calibration)) if calibration else None
    unofficial = why_not_official(reference) if loaded else "no calibration files were given"
    rows, names = [], list(dict.fromkeys(verdicts["generator"]))
    of_model, of_prompts = (dict(list(frame.groupby("generator", sort=False))) for frame in (verdicts, prompts))
    for name in names:
        if name not in outputs:
            raise UserError(f"verdicts about {name!r}: expected its outputs, found those of {sorted(outputs)}.")
        about = (of_prompts[name], of_model[name], outputs[name], reference)
        row = _row(str(name), *about, loaded, unofficial, seed, summaries=protocol in SUMMARIES)
        rows.append({**row, "judge": judge, "protocol": protocol})
    scored = scores(verdicts, lambda name: _texts(of_prompts[name], outputs[name], reference, name))
    for row, found in zip(rows, map(scored.get, names), strict=True):
        row |= found or {}
    more = dict.fromkeys(column for row in rows for column in row if column not in COLUMNS)
    board = with_bounds(with_ranks(pd.DataFrame(rows, columns=[*COLUMNS, *more]), standings_of(prompts, names)))
    return board.sort_values("win_rate", ascending=False, kind="stable", na_position="last", ignore_index=True)


def _row(
    name: str,
    prompts: pd.DataFrame,
    own: pd.DataFrame,
    outputs: Rows,
    reference: Rows,
    calibration: Calibration | None,
    unofficial: str,
    seed: int,
    *,
    summaries: bool,
) -> dict[str, Any]:
    reference_name = str(own["reference"].iloc[0])
    mine = rows_of_prompts(prompts["instruction"], outputs, name)
    theirs = rows_of_prompts(prompts["instruction"], reference, "the reference")
    preference = prompts["preference"].to_numpy(float)
    lengths, reference_lengths = np.array([list(map(length_of, mine)), list(map(length_of, theirs))])
    there = ~np.isnan(lengths + reference_lengths)
    interval, bias = win_rate_interval(preference), position_bias(own)
    rates = win_rates(preference)
    row: dict[str, Any] = {
        "name": name,
        **rates,
        "task": own["task"].iloc[0],
        "reference": reference_name,
        "win_rate_low": interval.low,
        "win_rate_high": interval.high,
        "n_failed": len(prompts) - rates["n_total"],
        **verbosity(
            *(values[there] for values in (preference, lengths, reference_lengths)),
            *([r.get(c) for r, known in zip(mine, there, strict=True) if known] for c in ("n_tokens", "truncated")),
        ),
        **wording(
            [row["output"] for row, known in zip(mine, there, strict=True) if known],
            prompts["instruction"][there].tolist() if summaries else None,
        ),
        **win_rates_by_length(*(values[there] for values in (preference, lengths, reference_lengths))),
        "flip_rate": _flip_rate(prompts),
        "orders": _orders(own),
        "read": _read_shares(own),
        "imported": "",
        "first_share": bias.first_share,
        "first_share_low": bias.low,
        "first_share_high": bias.high,
        "win_rate_shown_first": bias.shown_first,
        "win_rate_shown_second": bias.shown_second,
        "judge_prompt_tokens": _total(own, "prompt_tokens"),
        "judge_completion_tokens": _total(own, "completion_tokens"),
        "judge_price_usd": _total(own, "price_usd"),
    }
    notes = [interval.note, bias_note(bias)]
    if calibration and not unofficial and len(prompts) != len(reference):
        unofficial = f"{len(prompts)} of {len(reference)} prompts were judged"
    if calibration and not unofficial:
        row |= _official(name, reference_name, prompts, reference, preference, reference_lengths, lengths, calibration)
        if _is_extreme(rates["win_rate"], row["length_controlled_winrate"]):
            notes.append("the length-controlled win rate is far from the raw one: its model may have failed")
    else:
        preference, reference_lengths, lengths = preference[there], reference_lengths[there], lengths[there]
        adjusted, bounds = length_adjusted(preference, reference_lengths, lengths, seed=seed)
        row |= {
            "length_adjusted_winrate": adjusted,
            "length_adjusted_low": bounds.low,
            "length_adjusted_high": bounds.high,
        }
        notes.append(bounds.note)
        if calibration:
            notes.append(f"length-adjusted, not length-controlled: {unofficial}")
        longer = row["longer_share"] or 0.0
        shorter = float(np.mean(lengths < reference_lengths) * 100) if len(lengths) else 0.0
        if min(longer, shorter) < EXTRAPOLATION_SHARE and longer + shorter > 0:
            side = "longer" if longer < shorter else "shorter"
            share = min(longer, shorter)
            notes.append(f"only {share:.0f}% of its outputs are {side} than the reference's: equal length extrapolates")
    level = row.get("length_controlled_winrate", row.get("length_adjusted_winrate"))
    row["gain_from_length"] = gain_from_length(rates["win_rate"], level, (interval.low, interval.high))
    row["note"] = "; ".join(dict.fromkeys(note for note in notes if note))
    return row


def _texts(prompts: pd.DataFrame, outputs: Rows, reference: Rows, name: str) -> dict[int, tuple[str, str]]:
    """Number of a prompt -> the two outputs that were compared."""
    sides = (rows_of_prompts(prompts["instruction"], rows, name) for rows in (outputs, reference))
    pairs = zip(prompts["index"], *sides, strict=True)
    return {i: (a["output"], b["output"]) for i, a, b in pairs if a["output"] is not None and b["output"] is not None}


def _official(
    name: str,
    reference_name: str,
    prompts: pd.DataFrame,
    reference: Rows,
    preference: np.ndarray,
    reference_lengths: np.ndarray,
    lengths: np.ndarray,
    calibration: Calibration,
) -> dict[str, float]:
    if name == reference_name and (preference == 1.5).all():  # by definition, as in alpaca_eval
        return {"length_controlled_winrate": 50.0, "lc_standard_error": 0.0}
    position = {row["instruction"]: i for i, row in enumerate(reference)}
    order = np.argsort([position[instruction] for instruction in prompts["instruction"]])
    return length_controlled(preference[order], reference_lengths[order], lengths[order], calibration)


def _is_extreme(raw: float, controlled: float) -> bool:
    """AlpacaEval's sign that the length model failed: off by 10 points and by a quarter of the way to 0 or 100."""
    return controlled < min(raw * 0.75, raw - 10) or controlled > max(raw + (100 - raw) / 4, raw + 10)


def _read_shares(verdicts: pd.DataFrame) -> str:
    """Where the verdicts were read, as `logprobs 98%, text 2%`; empty where it is not known."""
    if "read" not in verdicts:
        return ""
    shares = verdicts["read"].dropna().value_counts(normalize=True)
    # Few and nearly all are not none and all.
    return ", ".join(
        f"{read} {100 * share:.{int(0 < min(share, 1 - share) < 0.005)}f}%" for read, share in shares.items()
    )


def _orders(verdicts: pd.DataFrame) -> str:
    """Whether prompts were asked in "both" orders, in "one", or outputs "singly"."""
    orders = set(verdicts["order"].dropna()) if "order" in verdicts else set()
    if orders <= {"none"}:
        return "singly" if orders else ""
    return "both" if (verdicts.groupby("index")["order"].nunique() > 1).any() else "one"


def _flip_rate(prompts: pd.DataFrame) -> float | None:
    flips = prompts["flipped"].dropna()
    return float(flips.astype(float).mean() * 100) if len(flips) else None


def _total(verdicts: pd.DataFrame, column: str) -> float | None:
    if column not in verdicts:
        return None
    values = pd.to_numeric(verdicts[column], errors="coerce").dropna()
    return float(values.sum()) if len(values) else None


def board_title(task: str, judge: str, protocol: str, reference: str, orders: str = "") -> str:
    """The title of a leaderboard. "AlpacaEval 2" has that benchmark's judge, prompt, reference and order."""
    official = judge == OFFICIAL_JUDGE and reference == OFFICIAL_REFERENCE and protocol == "alpaca_eval"
    if official and task.startswith("alpaca_eval"):
        return "AlpacaEval 2, but in both orders" if orders == "both" else "AlpacaEval 2"
    if protocol == "reward":
        return f"{task}, scored by the reward model {judge} against {reference}"
    return f"{task}, judged by {judge} with the {protocol} prompt against {reference}"


def write_leaderboard(board: pd.DataFrame, path: Path) -> Path:
    """Write a leaderboard as CSV, in full precision; and beside it as JSON (the same rows) and as a Markdown table.

    Args:
        board: with COLUMNS, and others if there are any.
        path: of the CSV file; the others have its name with `.json` and `.md`.
    """
    # A name with a carriage return alone would end the line; quotes are what keeps it.
    bare = any("\r" in str(name) for column in ("name", *CONTEXT_COLUMNS) for name in board[column])
    with replacing(path) as partial:
        board.to_csv(partial, index=False, quoting=csv.QUOTE_NONNUMERIC if bare else csv.QUOTE_MINIMAL)
    rows = board.astype(object).where(board.notna(), None).to_dict("records")
    write_atomically(path.with_suffix(".json"), json.dumps(rows, indent=1, default=_plain) + "\n")
    write_atomically(path.with_suffix(".md"), _markdown(board), errors="replace")
    return path


def _plain(value: Any) -> Any:
    """A number of numpy's as Python's."""
    return value.item()


def _markdown(board: pd.DataFrame) -> str:
    parts = []
    several = len(board[["judge", "protocol"]].drop_duplicates()) > 1
    for (task, judge, protocol, reference), rows in board.groupby([*CONTEXT_COLUMNS], sort=False, dropna=False):
        by = f", judged by {_literal(judge)} with the {_literal(protocol)} prompt" if several else ""
        parts.append(f"**{_literal(task)}, against {_literal(reference)}{by}**\n")
        parts.append("| rank | group | model | win rate, % | 95 % interval | length | no verdict |")
        parts.append("| --- | --- | --- | --- | --- | --- | --- |")
        for row in rows.to_dict("records"):
            name = _literal(row["name"]) + (" (published)" if row.get("imported") else "")
            bounds = [number(row[f"win_rate_{end}"]) for end in ("low", "high")]
            cells = [shown_rank(row), number(row["group"], 0), name, number(row["win_rate"])]
            cells += [" to ".join(dict.fromkeys(bounds)) if "n/a" in bounds else " to ".join(bounds)]
            cells += [number(row["avg_length"], 0), number(row["n_failed"], 0)]
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def _literal(text: Any) -> str:
    """A name as text of a Markdown table: it is neither markup nor HTML nor a cell of its own."""
    return re.sub(r"([\\\\`*_\[\]|!~])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def read_leaderboard(path: Path) -> pd.DataFrame:
    """Read what `write_leaderboard` wrote. Names stay text; a column that the file lacks is empty."""
    text = {c: str for c in ("name", "task", "judge", "protocol", "reference", "read", "imported", "note", "orders")}
    frame = pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])
    frame = frame.reindex(columns=[*COLUMNS, *(c for c in frame if c not in COLUMNS)])
    earlier = frame["flip_rate"].notna().map({True: "both", False: ""})
    frame["orders"] = frame["orders"].astype(object).where(frame["orders"].notna(), earlier)
    return frame.assign(**{column: frame[column].astype(object).fillna("") for column in ("note", "read", "imported")})
