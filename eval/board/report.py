"""The report: one self-contained page about any number of runs.

It is made of the files in their folders alone. Style, pictures and the script that sorts tables are inside the page; it
can be read without the script, and its policy forbids all that is elsewhere. A section whose files are missing is left
out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from eval import layout
from eval.board.curves import training_curves
from eval.board.effective_tokens import run_sentence
from eval.board.figures import FRONT, MANY_LABELS, Style, styles, win_rate_against_length
from eval.board.judges import AGREEMENT_HEADINGS, agreement_rows, agreement_sentences, badge, panel_health
from eval.board.leaderboard import board_title, write_leaderboard
from eval.board.numbers import count
from eval.board.pages import render, write_page
from eval.board.run_files import Board, RunFiles, boards, read_run, shown_names
from eval.board.sentences import (
    PUBLISHED,
    claim,
    explanation,
    front_sentence,
    judge_health,
    published_sentence,
    score_columns,
    scores_note,
    world_sentence,
)
from eval.board.standings import RANK_COLUMNS, Standings, groups_sentences, matrix, standings, with_bounds, with_ranks
from eval.board.verdicts.examples import examples, failures, sample
from eval.board.verdicts.model_pages import write_model_pages
from eval.board.verdicts.prompt_pages import write_prompt_pages
from eval.board.weights_page import pair_views
from eval.front import on_front
from eval.stats.wording import BUCKETS
from eval.sweeps.view import labels_view, sweep_view

EXAMPLES_SHOWN = 30
OUTPUTS_SHOWN = 1_000  # where models are many, fewer prompts are shown
WEIGHTS_SHOWN = 5
USUAL = {"logprobs", "identical"}  # where verdicts are read, nothing else is worth a list
# Heading, column and decimals. A column without any number other than 0 is left out.
VERBOSITY = [
    ("Longer than reference", "longer_share", 1),
    ("Of its wins, longer", "wins_when_longer", 1),
    ("Win rate when longer", "win_rate_when_longer", 1),
    ("Win rate when shorter", "win_rate_when_shorter", 1),
    ("Of its lead, by length", "gain_from_length", 1),
    ("Tokens an output", "avg_tokens", 1),
    ("Cut at the limit", "truncation_rate", 1),
    ("Sentences", "avg_sentences", 1),
    ("List items", "avg_list_items", 1),
    ("Compression", "compression_ratio", 1),
    ("Copied", "copy_rate", 1),
]
RATIOS = [(f"{name.replace('_', ' ')} x", f"win_rate_ratio_{name}", 1) for *_, name in BUCKETS]
HABITS = [
    ("Prefers the first", "first_share", 1),
    ("Win rate shown first", "win_rate_shown_first", 1),
    ("Win rate shown second", "win_rate_shown_second", 1),
    ("Verdicts that flip", "flip_rate", 1),
    ("Price, USD", "judge_price_usd", 2),
]
FIGURES = {"verbosity": VERBOSITY, "ratios": RATIOS, "habits": HABITS}


def build(run_dirs: Sequence[Path], out: Path, title: str | None = None) -> Path:
    """Write `report.html` into `out`, and beside it the pages with all verdicts.

    Args:
        run_dirs: folders of runs, sweeps or `otpo judge`.
        out: the folder to write to; for one run, usually its own. For several runs, their joint `leaderboard.csv` is
            written too, with the column `run`.
        title: of the page. Default: made of the runs' names.

    Returns:
        The path of report.html.

    Raises:
        UserError: a folder is missing, or has nothing to report.
    """
    runs = [read_run(Path(folder)) for folder in run_dirs]
    names = shown_names(runs)
    found = boards(runs, names)
    found = sorted(found, key=lambda board: (_between_models(board, found), (board.table["imported"] != "").all()))
    looks = _looks(names, found)
    compared = [_compare(board) for board in found]
    out.mkdir(parents=True, exist_ok=True)
    if len(runs) > 1 and found:
        write_leaderboard(pd.concat([b.table for b in found], ignore_index=True), out / layout.LEADERBOARD)
    subject = " and ".join(run.name for run in runs) if len(runs) < 4 else f"{len(runs)} runs"
    views = [
        _board_view(board, against, looks, out, _slug(board.task, i, found))
        | {"between_models": _between_models(board, found), "name": _board_name(board, found)}
        | {"badges": [badge(run.agreement) for run in runs if run.agreement and _judged_by(board, run.agreement)]}
        | {"panels": [said for run in runs for said in panel_health(run.panel.get(board.task), board.judge)]}
        for i, (board, against) in enumerate(zip(found, compared, strict=True))
    ]
    metrics = {names[i, label]: frame for i, run in enumerate(runs) for label, frame in run.metrics.items()}
    curves, curve_values = training_curves({k: v for k, v in metrics.items() if "step" in v and len(v)}, looks)
    weight_rows = [
        row | {"label": names[i, str(row.get("label"))]} for i, run in enumerate(runs) for row in run.weights
    ]
    weights, top = pair_views(weight_rows, WEIGHTS_SHOWN)
    nearly_uniform = [text for label, frame in metrics.items() if (text := run_sentence(label, frame))]
    context: dict[str, Any] = {
        "title": title or f"{subject}: report",
        "eyebrow": title or f"Report on {subject}",
        "footer": "Every number comes from the files in the run's folder. The page loads nothing from elsewhere.",
        "problems": [problem for run in runs for problem in run.problems],
        "boards": views,
        "looks": looks,
        "has_pairs": any(view["pairs"] for view in views),
        "has_examples": any(view["examples"] for view in views),
        "has_failures": any(view["failures"] for view in views),
        "sweeps": [sweep_view(sweep) for run in runs for sweep in run.sweep],
        "swept_labels": [view for run in runs if (view := labels_view(run.sweep))],
        "truths": [_truth(run.name, run.world) for run in runs if run.world],
        "agreements": [_agreement(run.agreement) for run in runs if run.agreement],
        "agreement_headings": AGREEMENT_HEADINGS,
        "curves": curves,
        "curve_values": curve_values,
        "curve_labels": [row["label"] for row in curve_values] if curves else [],
        "weights": weights,
        "nearly_uniform": nearly_uniform,
        "weights_top": top,
        "weights_left_out": f"The first {len(weights)} pairs; all are in weights.json."
        if len(weight_rows) > sum(len(item["sides"][0]["rows"]) - 1 for item in weights)
        else "",
        "provenance": [view for run in runs if (view := _provenance(run))],
    }
    context["has_weights"] = bool(weights or nearly_uniform)
    context["sections"] = _sections(context)
    return write_page(out / layout.REPORT, render("report.html.j2", **context))


def _looks(names: Mapping[tuple[int, str], str], found: Sequence[Board]) -> dict[str, Style]:
    labels = dict.fromkeys([*names.values(), *(label for _, label in names)])
    neutral = {board.reference for board in found if not _between_models(board, found)} | {"base"}
    return styles(list(labels), [label for label in labels if label.split("/")[-1] in neutral])


def _between_models(board: Board, found: Sequence[Board]) -> bool:
    """Whether models were judged against each other: the reference is a row of another board of the same task."""
    judged = (other.table["name"][other.table["imported"] == ""] for other in found if other.task == board.task)
    rows = [name.split("/")[-1] for names in judged for name in names]
    return board.reference in rows


def _board_name(board: Board, found: Sequence[Board]) -> str:
    """The task; with the reference, if several boards share the task."""
    shared = sum(other.task == board.task for other in found) > 1
    return f"{board.task}, against {board.reference}" if shared else board.task


def _sections(context: Mapping[str, Any]) -> list[tuple[str, str]]:
    several = len(context["boards"]) > 1
    listed = [
        (f"{anchor}-{n}", f"{board['name']}: {name.split()[-1].lower()}" if several else name)
        for n, board in enumerate(context["boards"], 1)
        for anchor, name in (("leaderboard", "Leaderboard"), ("length", "Win rate against length"))
        if anchor == "leaderboard" or not board["between_models"]
    ]
    parts = [
        ("sweeps", "sweep", "The sweep"),
        ("has_pairs", "pairs", "Paired differences"),
        ("agreements", "people", "The judge and people"),
        ("truths", "truth", "Known truth"),
        ("curves", "curves", "Training curves"),
        ("has_weights", "weights", "Token weights"),
        ("has_examples", "examples", "Examples"),
        ("has_failures", "failures", "Failed verdicts"),
        ("provenance", "provenance", "Provenance"),
    ]
    return listed + [(anchor, name) for key, anchor, name in parts if context[key]]


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain dictionaries, with None for NaN."""
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    return [{str(k): v for k, v in row.items()} for row in rows]


def _compare(board: Board) -> Standings:
    """Compare the models of a board, and give its table their ranks: those of several runs are new together."""
    against = standings(board.verdicts, board.outputs)
    if against.names:
        board.table = with_ranks(board.table, against)
    elif board.table["run"].nunique() > 1:
        board.table = board.table.assign(**dict.fromkeys(RANK_COLUMNS, None))
    board.table = with_bounds(board.table)
    return against


def _board_view(board: Board, against: Standings, looks: Mapping[str, Style], out: Path, slug: str) -> dict[str, Any]:
    table, pairs = board.table, against.pairs()
    own = table[table["imported"] == ""]
    official = bool(table["length_controlled_winrate"].notna().any())
    rows = _records(table)
    for row in rows:
        row["level"] = row["length_controlled_winrate" if official else "length_adjusted_winrate"]
        row |= {f"level_{end}": None if official else row[f"length_adjusted_{end}"] for end in ("low", "high")}
    all_examples = examples(board)
    models = max(1, len(table))
    shown = sample(all_examples, min(EXAMPLES_SHOWN, max(2, OUTPUTS_SHOWN // models)))
    pages, place = write_prompt_pages(all_examples, shown, board, looks, out, slug)
    own_pages = write_model_pages(all_examples, place, rows, board, out, slug)
    failed = failures(board)
    drawn = table[table["win_rate"].notna() & table["avg_length"].notna()]
    front = drawn[on_front(drawn, FRONT)].sort_values("avg_length", kind="stable")
    return {
        "task": board.task,
        "title": board_title(board.task, board.judge, board.protocol, board.reference, board.orders),
        "claim": claim(own, pairs) if len(own) else PUBLISHED,
        "sentences": explanation(own, pairs) if len(own) else [],
        "published": published_sentence(table),
        "rows": rows,
        "slug": slug,
        "own_pages": own_pages,
        "numbered": len(rows) > MANY_LABELS,
        "level_name": "Length-controlled" if official else "Length-adjusted",
        "level_note": _level_note(official),
        "ranked": bool(table["rank"].notna().any()) and len(table) > 1,
        "groups": groups_sentences(table, against),
        "lacking": [row for row in rows if row["n_failed"] and row["n_total"]][:MANY_LABELS],
        "health": judge_health(table, board.verdicts),
        "read": [row for row in rows if not set(re.findall("[a-z]+", row["read"] or "")) <= USUAL][:MANY_LABELS],
        "front": front_sentence(front["name"].tolist()) if len(drawn) > 1 else "",
        "scale": _scale(table),
        "scatter": win_rate_against_length(table, looks),
        "scatter_narrow": win_rate_against_length(table, looks, 350, 380),
        **{name: _filled(columns, own) for name, columns in FIGURES.items()},
        "scores": score_columns(table),
        "scores_note": scores_note(table),
        "pairs": _records(pairs),
        "matrix": matrix(against),
        "reach": _reach(pairs),
        "examples": shown,
        "n_examples": len(all_examples),
        "examples_sentence": f"{count(len(all_examples), 'prompt')}, all shown."
        if not pages
        else f"{len(shown)} of {count(len(all_examples), 'prompt')}, drawn at random, not picked.",
        "pages": pages,
        "failures": failed,
        "n_failed": sum(row["failed"] for row in failed),
        "n_verdicts": sum(row["verdicts"] for row in failed),
        "failure_types": sorted({kind for row in failed for kind in row["types"]}),
    }


def _judged_by(board: Board, figures: Mapping[str, Any]) -> bool:
    """Whether the judge of a board, asked in the same way, is the one that agreement.json is about."""
    return (board.judge, board.protocol) == (figures.get("judge"), figures.get("protocol"))


def _agreement(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "title": f"{figures['judge']}, protocol {figures['protocol']}, on {', '.join(figures['files'])}",
        "rows": agreement_rows(figures),
        "sentences": agreement_sentences(figures),
    }


def _filled(columns: Sequence[tuple[str, str, int]], table: pd.DataFrame) -> list[tuple[str, str, int]]:
    return [column for column in columns if (table[column[1]].fillna(0) != 0).any()]


def _scale(table: pd.DataFrame) -> tuple[float, float]:
    """The ends of the axis of win rates: all of them, their intervals and 50 %, rounded outwards to 10 points."""
    ends = [50.0, *(rate for end in ("", "_low", "_high") for rate in table[f"win_rate{end}"].dropna())]
    return max(0.0, 10 * math.floor(min(ends) / 10)), min(100.0, 10 * math.ceil(max(ends) / 10 + 1e-9))


def _reach(pairs: pd.DataFrame) -> tuple[float, float]:
    """The ends of the axis of differences: all intervals and zero, with a margin."""
    ends = [0.0, *(float(v) for c in ("low", "high") for v in pairs[c].dropna())]
    room = 0.05 * (max(ends) - min(ends)) or 1.0
    return min(ends) - room, max(ends) + room


def _level_note(official: bool) -> str:
    if official:
        return (
            "Length-controlled: AlpacaEval's definition, with its calibration files. Its standard error "
            "(lc_standard_error in leaderboard.csv) is the spread of fitted probabilities, not a sampling error."
        )
    return (
        "Length-adjusted: the win rate that a logistic fit to this board's verdicts predicts for outputs as long as "
        "the reference's. It is not AlpacaEval's length-controlled win rate; do not compare it with published ones."
    )


def _slug(task: str, i: int, found: Sequence[Board]) -> str:
    slug = layout.folder_name(task)
    return slug if sum(board.task == task for board in found) == 1 else f"{slug}-board{i + 1}"


def _truth(run: str, world: dict[str, Any]) -> dict[str, Any]:
    accuracy, words = world.get("accuracy") or {}, world.get("words") or {}
    parts = list(dict.fromkeys(part for row in accuracy.values() for part in row))
    rows = [
        {
            "label": label,
            "parts": [_percent(row.get(part)) for part in parts],
            "words": [(words.get(label) or {}).get(part) for part in parts],
        }
        for label, row in accuracy.items()
    ]
    return {
        "run": run,
        "note": world.get("note"),
        "sentence": world_sentence(world),
        "parts": [{"title": part.replace("_", " ").capitalize()} for part in parts],
        "accuracy": rows,
        "deciding": [
            {k: row.get(k) for k in ("label", "reg", "auc", "ratio", "n")} for row in world.get("deciding_token") or []
        ],
    }


def _percent(cell: dict[str, Any] | None) -> dict[str, float | None]:
    """An accuracy {value, low, high, n} with its fractions as percentages."""
    cell = cell or {}
    scaled = {k: None if cell.get(k) is None else 100 * cell[k] for k in ("value", "low", "high")}
    return scaled | {"n": cell.get("n")}


def _provenance(run: RunFiles) -> dict[str, Any] | None:
    if run.manifest is None and run.recipe is None:
        return None
    manifest = run.manifest or {}
    rows = [
        {
            "name": name,
            "seconds": stage.get("seconds"),
            "finished": str(stage.get("finished") or "")[:19].replace("T", " "),
            "inputs": str(stage.get("inputs") or "")[:16],
        }
        for name, stage in (manifest.get("stages") or {}).items()
    ]
    return {"name": run.name, "stages": rows, "versions": manifest.get("versions") or {}, "recipe": run.recipe}
