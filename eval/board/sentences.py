"""What a leaderboard says, in sentences that a reader can quote."""

from __future__ import annotations

from typing import Any

import pandas as pd

from eval.board.numbers import count, number, points, relative


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
    if pd.isna(pair["low"]) or pair["low"] <= 0:
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
        settled = "zero is outside" if pair["low"] > 0 else "zero is inside, so their order is not settled"
        sentences.append(
            f"On the {count(pair['n'], 'prompt')} that both were judged on, {name} and {pair['other']} differ by "
            f"{points(pair['difference'])} (95% interval {number(pair['low'])} to {number(pair['high'])}; {settled})."
        )
    if _prefers_a_place(best):
        shown = [number(best[f"win_rate_shown_{place}"]) for place in ("first", "second")]
        sentences.append(
            f"Its outputs win {shown[0]}% where they are shown first and {shown[1]}% where they are shown second: the "
            "win rate is partly the judge's preference for a place. Ask in both orders."
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
    return sentences


def length_sentence(judged: pd.DataFrame) -> str:
    """How long the best model's outputs are, compared with the reference's and the second model's."""
    best = judged.iloc[0]
    if pd.isna(best["avg_length"]):
        return "The lengths of the outputs are not known."
    text = f"Its outputs average {number(best['avg_length'], 0)} characters"
    if not pd.isna(best["length_ratio"]):
        text += f", {relative(best['length_ratio'])} the reference's"
    if len(judged) > 1 and judged.iloc[1]["avg_length"] > 0:
        second = judged.iloc[1]
        text += f" and {relative(best['avg_length'] / second['avg_length'])} those of {second['name']}"
    return text + "."


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
