"""Token weights as text coloured by weight, for `otpo weights` and the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from eval.figures import plan_heatmap
from eval.leaderboard import number
from eval.pages import render, write_page
from eval.words import count

# The darkest background on which the dark text keeps a contrast of 4.5.
DARKEST = 0.7
LARGEST_PLAN = 80


def build_weights_page(rows: Sequence[dict[str, Any]], out: Path) -> Path:
    """Write a self-contained page of token weights.

    Args:
        rows: like weights.json: label, method, prompt, chosen_tokens and chosen_weights (m,), rejected_tokens and
            rejected_weights (n,), uniform_chosen and uniform_rejected (a token's weight without the method), metrics;
            and, where there is one, `plan` (m, n).
        out: the HTML file.
    """
    methods = sorted({str(row.get("label") or row.get("method")) for row in rows})
    pairs, top = pair_views(rows)
    page = render(
        "weights.html.j2",
        title=f"What each token weighs: {', '.join(methods)}",
        sentence=f"{count(len(pairs), 'preference pair')}. Every token of both answers, with what it counts in the "
        "loss; beside it the same answer with every token counted alike.",
        pairs=pairs,
        top=top,
    )
    return write_page(out, page)


def pair_views(rows: Sequence[dict[str, Any]], limit: int | None = None) -> tuple[list[dict[str, Any]], float]:
    """What the template shows: a view a pair, the methods that weighed it side by side; and the scale's upper end.

    All pairs share one scale. It ends at the median of the pairs' largest weights, so that one extreme token does not
    make all the others look alike.
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
        "metrics": [f"{_label(row)}: {text}" for row in group if (text := _metrics(row))],
        "plans": [plan for row in group if (plan := _plan(row))],
    }


def _label(row: dict[str, Any]) -> str:
    return str(row.get("label") or row.get("method"))


def _metrics(row: dict[str, Any]) -> str:
    found = {k: v for k, v in (row.get("metrics") or {}).items() if isinstance(v, int | float)}
    return ", ".join(f"{name} {number(value, 3)}" for name, value in found.items())


def _plan(row: dict[str, Any]) -> dict[str, Any] | None:
    chosen, rejected, plan = row["chosen_tokens"], row["rejected_tokens"], row.get("plan")
    if plan is None or not chosen or not rejected:
        return None
    if max(len(chosen), len(rejected)) > LARGEST_PLAN:
        sentence = f"{len(chosen)} by {len(rejected)} tokens are too many to draw; the JSON output holds the numbers."
        return {"label": _label(row), "svg": "", "width": 0, "sentence": sentence}
    svg, width = plan_heatmap(plan, chosen, rejected)
    value, i, j = max((float(value), i, j) for i, line in enumerate(plan) for j, value in enumerate(line))
    sentence = (
        "How much mass moves from each chosen token (rows) to each rejected one (columns). "
        f"The most, {number(value, 3)}, moves from {_text(chosen[i])!r} to {_text(rejected[j])!r}."
    )
    return {"label": _label(row), "svg": svg, "width": width, "sentence": sentence}


def _text(token: str) -> str:
    """A token as it can be seen: marks of byte-level tokenizers and white space made visible."""
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
