"""What to say of judges: how far they agree with people, with each other in a panel, and with the one before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.board.numbers import count, number


def agreement_sentences(figures: Mapping[str, Any]) -> list[str]:
    """How far a judge agrees with people: the figures of agreement.json, for the terminal and for a board's page."""
    n = count(figures["n"], "pair")
    if not figures["n"]:
        return [f"None of {count(figures['pairs'], 'pair')} has both a human winner and two verdicts."]
    sentences = [
        f"It names the output that people prefer in {share(figures, 'accuracy')} of {n}, and in both orders in "
        f"{share(figures, 'both_correct')}. Taking the longer output on sight is right in "
        f"{share(figures, 'accuracy_longer')}."
    ]
    if figures.get("judge_agreement_on_winners") is not None:
        sentences.append(
            f"It agrees with one person in {share(figures, 'judge_agreement_on_winners')}, and two people with each "
            f"other in {share(figures, 'human_agreement_on_winners')}, of the pairs where both name a winner."
        )
    sentences += _calibration_sentences(figures.get("calibration") or {})
    if figures["first_share_low"] is not None and not figures["first_share_low"] <= 0.5 <= figures["first_share_high"]:
        sentences.append(f"It prefers the output that is shown first in {share(figures, 'first_share')}.")
    if figures["n_failed"]:
        ends = [number(100 * figures[f"accuracy_if_missing_{outcome}"]) for outcome in ("wrong", "right")]
        sentences.append(
            f"{count(figures['n_failed'], 'pair')} without a verdict: had all of them been wrong or right, its "
            f"accuracy would be {' or '.join(ends)}%."
        )
    left = {"ties": "people call a tie", "undecided": "have no most frequent label"}
    if parts := [f"{figures[key]:,} that {about}" for key, about in left.items() if figures[key]]:
        sentences.append(f"Not counted, of {count(figures['pairs'], 'pair')}: {' and '.join(parts)}.")
    return sentences


def _calibration_sentences(found: Mapping[str, Any]) -> list[str]:
    """Whether the judge is as often right as it is sure. Whole verdicts say nothing of how sure it is."""
    if found.get("temperature") is None:
        return []
    gap = found["confidence"] - found["right"]
    outside = not found["right_low"] <= found["confidence"] <= found["right_high"]
    how = ("overconfident" if gap > 0 else "less sure than it could be") if outside else "about as often right as sure"
    error, brier = number(100 * found["calibration_error"]), number(found["brier"], 3)
    return [
        f"It is {how}: {number(100 * found['confidence'])}% sure on average and right in {share(found, 'right')} of its"
        f" verdicts, calibration error {error} points, Brier score {brier}; log-odds divided by"
        f" {number(found['temperature'], 2)} would fit people best."
    ]


AGREEMENT_HEADINGS = (
    "pairs of", "n", "accuracy, 95% interval", "output 1 first", "output 2 first", "both right", "consistency", "kappa",
    "the longer", "failed",
)  # fmt: skip


def agreement_rows(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The figures of agreement.json under AGREEMENT_HEADINGS: a row for each category, and one for all pairs."""
    rows = []
    for name, row in [*figures.get("categories", {}).items(), ("all", figures)]:
        kappa = number(row["kappa_orders"], 2)
        if row["kappa_orders"] is not None:
            kappa += f" ({number(row['kappa_orders_low'], 2)} to {number(row['kappa_orders_high'], 2)})"
        columns = ("accuracy_first_order", "accuracy_second_order", "both_correct", "consistency", "accuracy_longer")
        *shares, longer = (number(None if row[key] is None else 100 * row[key]) for key in columns)
        accuracy = share(row, "accuracy").replace("%", "")
        rows.append((name, f"{row['n']:,}", accuracy, *shares, kappa, longer, f"{row['n_failed']:,}"))
    return rows


def share(figures: Mapping[str, Any], name: str) -> str:
    """A fraction as a percentage, with its interval where it has one: `95.5% (90.7 to 98.0)`."""
    if figures[name] is None:
        return "n/a"
    text, low = f"{number(100 * figures[name])}%", figures.get(f"{name}_low")
    return text if low is None else f"{text} ({number(100 * low)} to {number(100 * figures[f'{name}_high'])})"


def panel_sentences(figures: Mapping[str, Any]) -> list[str]:
    """How far the judges of a panel agree, a sentence each."""
    told = [(f"{row['judge']} and the panel", row) for row in figures["judges"]]
    told += [(f"{row['judge']} and {row['other']}", row) for row in figures["pairs"]]
    return [f"{who} name the same winner on {share(row, 'agreement')} of {row['n']:,} prompts" for who, row in told]


def panel_health(figures: Mapping[str, Any] | None, judge: str) -> list[str]:
    """`panel_sentences` for the page of a board, where the panel is what it calls its judge."""
    names = [str(row["judge"]) for row in figures["judges"]] if figures else []
    if not figures or not judge.endswith(f" of {', '.join(names[:-1])} and {names[-1]}"):
        return []
    return [f"{said}." for said in panel_sentences(figures)]


def badge(figures: Mapping[str, Any]) -> str:
    """A judge's agreement with people in a few words."""
    return f"{share(figures, 'accuracy')} of {count(figures['n'], 'pair')}"


def judges_named(figures: Mapping[str, Any]) -> tuple[str, str]:
    """What to call the old and the new judge of migration.json, which may be one judge that is asked otherwise."""
    old, new = figures["old_judge"], figures["new_judge"]
    if old != new:
        return old, new
    if figures["old_protocol"] != figures["new_protocol"]:
        return f"{old} by {figures['old_protocol']}", f"{new} by {figures['new_protocol']}"
    return f"{old} before", f"{new} now"


def migration_sentences(figures: Mapping[str, Any]) -> list[str]:
    """What another judge changes on a board."""
    old, new = judges_named(figures)
    told = [f"{new} and {old} name the same winner on {share(figures, 'agreement')} of {figures['n']:,} prompts."]
    if figures["old_protocol"] != figures["new_protocol"]:
        told.append(f"They were asked by different protocols: {figures['new_protocol']} and {figures['old_protocol']}.")
    moved = f"{figures['moved']:,} of {count(len(figures['models']), 'model')} change rank"
    tau = figures["kendall_tau"]
    return [*told, moved + ("." if tau is None else f"; Kendall's tau of the two orders is {number(tau, 2)}.")]
