"""What a leaderboard says, in sentences that a reader can quote."""

from __future__ import annotations

from typing import Any

import pandas as pd

from eval.board.numbers import count, number, points, relative
from eval.judge.table import several_models
from eval.published.lm_eval import LM_EVAL
from eval.stats.scores import CRITERION

READ = {
    "logprobs": "from the probabilities of the two letters",
    "text": "from the text",
    "json": "from JSON",
    "tool": "from the call of a tool",
    "score": "the difference of a reward model's scores",
    "samples": "the mean of several samples",
    "panel": "what several judges say together",
    "identical": "identical outputs, a draw without a call",
}
FRONT_NAMED = 12
SCORES = [
    ("Score", "score", 1),
    ("Score, low", "score_low", 1),
    ("Score, high", "score_high", 1),
    ("Reference's score", "reference_score", 1),
    ("Style-controlled", "style_controlled", 1),
    ("Style, low", "style_controlled_low", 1),
    ("Style, high", "style_controlled_high", 1),
]
"""Heading, column and decimals."""


def claim(board: pd.DataFrame, pairs: pd.DataFrame) -> str:
    """The headline of the page: who won against whom, and by how much."""
    judged = board[board["n_total"] > 0]
    if judged.empty:
        return "No verdict came back, so nothing can be said about who won."
    best = judged.iloc[0]
    rate, reference = f"{number(best['win_rate'])}%", best["reference"]
    if doubt := _prefers_a_place(best):
        return f"{best['name']} wins {rate} against {reference}, but its judge {doubt}, and was asked in one order."
    pair = runner_up(judged, pairs)
    if pair is None:
        return f"{best['name']} wins {rate} against {reference}."
    if not (pair["settled"] and pair["difference"] > 0):
        second = f"{number(judged.iloc[1]['win_rate'])}%"
        return f"{best['name']} and {pair['other']} are too close to call: {rate} and {second} against {reference}."
    return f"{best['name']} wins {rate} against {reference}, {points(pair['difference'])} more than {pair['other']}."


def explanation(board: pd.DataFrame, pairs: pd.DataFrame) -> list[str]:
    """A few sentences: how sure the claim is, how long the outputs are, and what failed."""
    judged = board[board["n_total"] > 0]
    if judged.empty:
        return [f"All {int(board['n_failed'].sum())} prompts are without a verdict; the causes are counted below."]
    best = judged.iloc[0]
    name, low, high = best["name"], best["win_rate_low"], best["win_rate_high"]
    relation = "and 50% is inside it, so neither is shown to be better"
    if low > 50 or high < 50:
        relation = f"all of it {'above' if low > 50 else 'below'} 50%"
    sentences = [
        f"The 95% interval of {name} over {count(best['n_total'], 'prompt')} is {number(low)} to {number(high)}%, "
        f"{relation}."
    ]
    pair = runner_up(judged, pairs)
    if pair is not None and not pd.isna(pair["low"]):
        settled = "zero is inside, so their order is not settled"
        if pair["low"] > 0:
            settled = "zero is outside"
            if not pair["settled"]:
                settled += ", but not clearly enough among all comparisons and missing verdicts to settle their order"
        sentences.append(
            f"On the {count(pair['n'], 'prompt')} that both were judged on, {name} and {pair['other']} differ by "
            f"{points(pair['difference'])} (95% interval {number(pair['low'])} to {number(pair['high'])}; {settled})."
        )
    if _prefers_a_place(best):
        shown = [number(best[f"win_rate_shown_{place}"]) for place in ("first", "second")]
        sentences.append(
            f"The outputs of {name} win {shown[0]}% where they are shown first and {shown[1]}% where they are shown"
            " second: the win rate is partly the judge's preference for a place. Ask in both orders."
        )
    sentences.append(length_sentence(judged))
    controlled, adjusted = best["length_controlled_winrate"], best["length_adjusted_winrate"]
    if not pd.isna(controlled):
        sentences.append(f"Its length-controlled win rate (AlpacaEval's definition) is {number(controlled)}%.")
    elif not pd.isna(adjusted):
        bounds = ""
        if not pd.isna(best["length_adjusted_low"]):
            bounds = f" ({number(best['length_adjusted_low'])} to {number(best['length_adjusted_high'])})"
        sentences.append(f"At equal length its win rate is estimated at {number(adjusted)}%{bounds}.")
    if failed := int(board["n_failed"].sum()):
        asked = failed + int(board["n_total"].sum())
        sentences.append(f"{failed:,} of {count(asked, 'output')} got no verdict; they are counted, not guessed.")
        if best["n_failed"] and not pd.isna(best["win_rate_if_missing_lost"]):
            ends = [number(best[f"win_rate_if_missing_{outcome}"]) for outcome in ("lost", "won")]
            sentences.append(
                f"If all that {name} lacks had been lost or won, its win rate would be {' or '.join(ends)}%."
            )
    return sentences


def length_sentence(judged: pd.DataFrame) -> str:
    """How long the best model's outputs are, compared with the reference's and the second model's."""
    best = judged.iloc[0]
    if pd.isna(best["avg_length"]):
        return "The lengths of the outputs are not known."
    text = f"The outputs of {best['name']} average {number(best['avg_length'], 0)} characters"
    if not pd.isna(best["length_ratio"]):
        text += f", {relative(best['length_ratio'])} the reference's"
    if len(judged) > 1 and judged.iloc[1]["avg_length"] > 0:
        second = judged.iloc[1]
        text += f" and {relative(best['avg_length'] / second['avg_length'])} those of {second['name']}"
    return text + "."


def judge_health(board: pd.DataFrame, verdicts: pd.DataFrame) -> list[str]:
    """How far the judge can be trusted: what failed, whether a place decides, and where its verdicts were read.

    Args:
        board: a leaderboard.
        verdicts: those of the board; may be empty, and of an earlier version.
    """
    sentences = []
    if not verdicts.empty:
        missing = verdicts[verdicts["preference"].isna()]
        asked = count(len(verdicts), "verdict")
        if missing.empty:
            sentences.append(f"{asked} asked for; none failed.")
        else:
            kinds = missing["error"].fillna("cause not recorded") if "error" in missing else pd.Series(dtype=str)
            causes = ", ".join(f"{kind} {times:,}" for kind, times in kinds.astype(str).value_counts().items())
            share = number(100 * len(missing) / len(verdicts))
            sentences.append(f"{asked} asked for; {len(missing):,} failed ({share}%){': ' if causes else ''}{causes}.")
    if changed := several_models(verdicts):
        sentences.append(changed)
    known = board[board["first_share"].notna()]
    if not known.empty:
        biased = int(((known["first_share_low"] > 50) | (known["first_share_high"] < 50)).sum())
        sentences.append(
            f"It prefers the answer that is shown first in {number(known['first_share'].mean())}% (mean over the "
            f"models; 50 is no preference). For {biased:,} of {count(len(known), 'model')} that is more than chance."
        )
    flips = board[board["flip_rate"].notna()]
    if not flips.empty:
        weight = flips["n_total"].astype(float)
        rate = float((flips["flip_rate"].astype(float) * weight).sum() / max(weight.sum(), 1.0))
        sentences.append(f"Asked in both orders, it names another winner on {number(rate)}% of the prompts.")
    elif not known.empty:
        sentences.append("Each pair was asked in one order, so how often the order decides is not known.")
    if "read" in verdicts and verdicts["read"].notna().any():
        shares = verdicts["read"].dropna().value_counts(normalize=True)
        parts = ", ".join(f"{READ.get(str(read), str(read))} {number(100 * share)}%" for read, share in shares.items())
        sentences.append(f"How its verdicts were read: {parts}.")
    return sentences


def front_sentence(names: list[str]) -> str:
    """Which models are on the front of win rate against length, the shortest outputs first."""
    if not names:
        return ""
    listed = ", ".join(names[:FRONT_NAMED]) + (f" and {len(names) - FRONT_NAMED} more" if names[FRONT_NAMED:] else "")
    return f"On the stepped line are the models that no other beats with outputs as short or shorter: {listed}."


def _prefers_a_place(row: Any) -> str:
    """What a judge does who prefers the output in one place; empty where it does not, or was asked in both orders."""
    low, high = row["first_share_low"], row["first_share_high"]
    if pd.isna(low) or low <= 50 <= high or not pd.isna(row["flip_rate"]):
        return ""
    place = "first" if row["first_share"] > 50 else "second"
    return f"prefers the output shown {place} (the first in {number(row['first_share'])}%)"


def world_sentence(world: dict[str, Any]) -> str | None:
    """How often the best model is right, if a small world's truth is known."""
    accuracy = world.get("accuracy") or {}
    held_out = {k: v["held_out"] for k, v in accuracy.items() if isinstance(v, dict) and "held_out" in v}
    trained = {k: v for k, v in held_out.items() if k != "base"}
    if not trained:
        return None
    best = max(trained, key=lambda k: trained[k]["value"])
    text = (
        f"Where the truth is known, {best} answers {number(100 * trained[best]['value'])}% of held-out questions right"
    )
    if "base" in held_out:
        text += f"; the base model {number(100 * held_out['base']['value'])}%"
    return text + "."


def runner_up(judged: pd.DataFrame, pairs: pd.DataFrame) -> dict[str, Any] | None:
    """The paired difference between the two best models of a leaderboard, the better one first."""
    if len(judged) < 2 or pairs.empty:
        return None
    first, second = judged.iloc[0]["name"], judged.iloc[1]["name"]
    for better, other, sign in ((first, second, 1), (second, first, -1)):
        found = pairs[(pairs["better"] == better) & (pairs["other"] == other) & (pairs["n"] > 0)]
        if not found.empty:
            row = dict(found.iloc[0])
            if sign < 0:  # failed verdicts can reverse the order on the prompts that both have
                low, high = row["high"], row["low"]
                row |= {"better": first, "other": second, "difference": -row["difference"]}
                row |= {"low": None if pd.isna(low) else -low, "high": None if pd.isna(high) else -high}
            return row
    return None


PUBLISHED = "Published figures"


def published_sentence(table: pd.DataFrame) -> str:
    """Which rows of a leaderboard are figures of other people; empty where none are."""
    rows = table[table["imported"] != ""]
    if rows.empty:
        return ""
    files = ", ".join(dict.fromkeys(rows["imported"].astype(str)))
    return (
        f"{count(len(rows), 'row')} marked as published: figures imported from {files}, which nobody judged here. "
        "Without verdicts they have no interval and no rank."
    )


def score_columns(table: pd.DataFrame) -> list[tuple[str, str, int]]:
    """Heading, column and decimals of the scores that a board has."""
    criteria = [(str(name), str(name), 1) for name in table if str(name).startswith(CRITERION)]
    harness = [(str(name), str(name), 3) for name in table if str(name).startswith(LM_EVAL)]
    return [column for column in (*SCORES, *criteria, *harness) if table[column[1]].notna().any()]


def scores_note(table: pd.DataFrame) -> str:
    """What the scores are."""
    harness = any(str(name).startswith(LM_EVAL) and table[name].notna().any() for name in table)
    imported = "Columns that begin with lm_eval are figures of lm-evaluation-harness, as they were imported." * harness
    if not any(table[column].notna().any() for _, column, _ in SCORES):
        return imported
    return f"{_scores_note(table)} {imported}".strip()


def _scores_note(table: pd.DataFrame) -> str:
    if table["reference_score"].notna().any():
        return (
            "Score: the mean of what the judge gave each output, seen alone, with its 95% interval over prompts. A "
            "model wins a prompt where its output's score is higher than the reference's."
        )
    return (
        "Score: percent of games won, a tie half, where a strong win or loss counts as often as its grade says. "
        "Style-controlled: the same if the outputs had the reference's length, headers, lists and bold text, by a "
        "logistic fit to all models of the board. Both with 95% intervals over prompts. Ranks are of the win rate."
    )
