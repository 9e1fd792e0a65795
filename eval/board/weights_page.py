"""Token weights as text shaded by weight, for `otpo weights` and the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from eval.board.effective_tokens import MASS, effective_shares, nearly_uniform, pair_sentence, pairs_sentence
from eval.board.figures import heat_image, plan_heatmap
from eval.board.numbers import count, number
from eval.board.pages import render, write_page

DARKEST = 0.7  # opacity of the darkest background on which the text keeps a contrast of 4.5
LARGEST_NAMED = 80  # a plan with more tokens a side has no room for their names
STRONGEST = 5  # entries of a plan that are named in words
IN_TABLE = {MASS, "weights/min", "weights/max"} | {
    f"weights/{figure}_{side}" for figure in ("entropy", "effective_tokens") for side in ("chosen", "rejected")
}


def build_weights_page(rows: Sequence[dict[str, Any]], out: Path) -> Path:
    """Write a self-contained page of token weights.

    Args:
        rows: as in weights.json: label, method, prompt, chosen_tokens and chosen_weights (m,), rejected_tokens and
            rejected_weights (n,), uniform_chosen and uniform_rejected (a token's weight without the method), metrics.
            Optional: `plan` (m, n), and `grid`, the same pair at other values of reg and reg_m, with cells {reg, reg_m,
            asked, chosen_weights, rejected_weights, metrics, plan (of any size)}.
        out: the HTML file.
    """
    methods = sorted({str(row.get("label") or row.get("method")) for row in rows})
    pairs, top = pair_views(rows)
    page = render(
        "weights.html.j2",
        title=f"Token weights: {', '.join(methods)}",
        sentence=f"{count(len(pairs), 'preference pair')}. Each token of both completions with its weight in the loss; "
        "beside it, the same completion with uniform weights.",
        nearly_uniform=pairs_sentence(rows),
        pairs=pairs,
        top=top,
    )
    return write_page(out, page)


def pair_views(rows: Sequence[dict[str, Any]], limit: int | None = None) -> tuple[list[dict[str, Any]], float]:
    """What the template shows of each pair, with its methods side by side; and the weight of the darkest shade.

    All pairs share one scale. It ends at the median of the pairs' largest weights, so that one extreme token does not
    make all the others look alike.

    Args:
        rows: see `build_weights_page`.
        limit: show only the first so many pairs.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["prompt"], tuple(row["chosen_tokens"]), tuple(row["rejected_tokens"]))
        groups.setdefault(key, []).append(row)
    shown = list(groups.values())[:limit]
    largest = [max([0.0, *row["chosen_weights"], *row["rejected_weights"]]) for group in shown for row in group]
    top = float(median(largest)) if largest else 0.0
    return [_pair_view(group, top) for group in shown], top


def _pair_view(group: Sequence[dict[str, Any]], top: float) -> dict[str, Any]:
    sides = []
    for side in ("chosen", "rejected"):
        tokens = group[0][f"{side}_tokens"]
        rows = [
            {"name": f"weighted by {_label(row)}", "tokens": _spans(tokens, row[f"{side}_weights"], top)}
            for row in group
        ]
        uniform = next((row[f"uniform_{side}"] for row in group if row.get(f"uniform_{side}") is not None), None)
        if uniform is not None:
            rows.append({"name": "uniform", "tokens": _spans(tokens, [uniform] * len(tokens), top)})
        sides.append({"name": side.capitalize(), "rows": rows})
    return {
        "prompt": group[0]["prompt"],
        "sides": sides,
        "nearly_uniform": [sentence for row in group if (sentence := pair_sentence(row, _label(row)))],
        "figures": [figures for row in group if (figures := _figures(row))],
        "metrics": [f"{_label(row)}: {text}" for row in group if (text := _other_metrics(row))],
        "plans": [plan for row in group if (plan := _plan(row))],
        "grids": [_grid(row) for row in group if row.get("grid")],
    }


def _label(row: dict[str, Any]) -> str:
    return str(row.get("label") or row.get("method"))


def _figures(row: dict[str, Any]) -> dict[str, Any] | None:
    """A row of the table of figures: effective tokens, entropy, range and mass of the weights."""
    metrics = row.get("metrics") or {}
    if "weights/entropy_chosen" not in metrics:
        return None
    sides = [
        {
            "effective": metrics[f"weights/effective_tokens_{side}"],
            "tokens": len(row[f"{side}_weights"]),
            "entropy": metrics[f"weights/entropy_{side}"],
        }
        for side in ("chosen", "rejected")
    ]
    return {
        "label": _label(row),
        "sides": sides,
        "low": metrics.get("weights/min"),
        "high": metrics.get("weights/max"),
        "mass": metrics.get(MASS),
    }


def _other_metrics(row: dict[str, Any]) -> str:
    found = {k: v for k, v in (row.get("metrics") or {}).items() if isinstance(v, int | float) and k not in IN_TABLE}
    return ", ".join(f"{name} {number(value, 3)}" for name, value in found.items())


def _plan(row: dict[str, Any]) -> dict[str, Any] | None:
    if row.get("plan") is None or not row["chosen_tokens"] or not row["rejected_tokens"]:
        return None
    chosen, rejected = ([_text(token) for token in row[f"{side}_tokens"]] for side in ("chosen", "rejected"))
    mass = np.asarray(row["plan"], dtype=float)
    order = np.argsort(-mass, axis=None, kind="stable")[:STRONGEST]
    places = [divmod(int(place), mass.shape[1]) for place in order]
    moves = ", ".join(f"{chosen[i]!r} to {rejected[j]!r} ({number(mass[i, j], 3)})" for i, j in places)
    named = max(mass.shape) <= LARGEST_NAMED
    words = f"Transport plan of {len(chosen)} chosen by {len(rejected)} rejected tokens. The most mass: {moves}."
    svg, width = plan_heatmap(mass, chosen, rejected, words, named=named)
    sentence = f"The mass that moves from each chosen token (rows) to each rejected one (columns). The most: {moves}."
    if not named:
        sentence += " The axes count tokens: there are too many to name."
    return {"label": _label(row), "svg": svg, "width": width, "sentence": sentence}


def _grid(row: dict[str, Any]) -> dict[str, Any]:
    """The pair at every reg (rows) and reg_m (columns)."""
    cells = [_cell(cell) for cell in row["grid"]]
    regs, reg_ms = (list(dict.fromkeys(cell[name] for cell in cells)) for name in ("reg", "reg_m"))
    lines = [{"reg": reg, "cells": [cell for cell in cells if cell["reg"] == reg]} for reg in regs]
    lengths = [len(row[f"{side}_weights"]) for side in ("chosen", "rejected")]
    return {"label": _label(row), "reg_ms": reg_ms, "lines": lines, "lengths": lengths}


def _cell(cell: dict[str, Any]) -> dict[str, Any]:
    chosen, rejected = (np.asarray(cell[f"{side}_weights"], dtype=float) for side in ("chosen", "rejected"))
    mass, metrics = np.asarray(cell["plan"], dtype=float), cell["metrics"]
    return {
        "reg": cell["reg"],
        "reg_m": cell["reg_m"],
        "asked": cell["asked"],
        "nearly_uniform": nearly_uniform(effective_shares(cell)),
        # a weight equal to the mean has the middle shade
        "chosen": heat_image(chosen[:, None], 2 * chosen.mean()),
        "rejected": heat_image(rejected[None], 2 * rejected.mean()),
        "plan": heat_image(mass, mass.max()),
        "entropy": [metrics[f"weights/entropy_{side}"] for side in ("chosen", "rejected")],
        "effective": [metrics[f"weights/effective_tokens_{side}"] for side in ("chosen", "rejected")],
        "mass": metrics[MASS],
    }


def _text(token: str) -> str:
    """A token with its white space made visible, including the Ġ and Ċ of byte-level tokenizers."""
    text = str(token).replace("Ġ", " ").replace("Ċ", "\n")
    return text.strip(" ").replace("\n", "↵").replace("\t", "⇥") or ("␣" if text else "∅")


def _spans(tokens: Sequence[str], weights: Sequence[float], top: float) -> list[dict[str, Any]]:
    return [
        {
            "text": _text(token),
            "starts_word": str(token)[:1] in (" ", "Ġ"),
            "weight": float(weight),
            "alpha": round(DARKEST * min(1.0, float(weight) / top), 3) if top > 0 else 0.0,
        }
        for token, weight in zip(tokens, weights, strict=True)
    ]
