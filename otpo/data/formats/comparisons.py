"""Formats of public data sets that hold two or more responses to a prompt, and say which is the better one."""

from __future__ import annotations

import math
import re
from typing import Any

from otpo.data.formats.cells import is_null, parsed, string_of, text_of
from otpo.data.formats.columns import instruction_of
from otpo.data.rows import BadRow, Parts, Row, Text, number_of

_SIDE = re.compile(r"(?:(?:model|assistant|response|answer|completion|output)[_ ]?)?([ab012])(?:\.0)?")


def shp(row: Row) -> Parts:
    """`{history, human_ref_A, human_ref_B, labels}`: Stanford Human Preferences; labels = 1 prefers A, 0 prefers B."""
    words = {"true": 1.0, "false": 0.0}
    label = words.get(str(row.get("labels")).strip().lower())
    if label is None and (label := number_of(row, "labels")) not in words.values():
        raise BadRow("labels is none of 0, 1")
    return _ordered(text_of(row, "history"), row, ("human_ref_A", "human_ref_B"), label == 1)


def safe_rlhf(row: Row) -> Parts:
    """`{prompt, response_0, response_1, better_response_id}`: PKU-SafeRLHF; the more helpful response is chosen."""
    first = _names_first(row, "better_response_id", "01")
    return _ordered(text_of(row, "prompt"), row, ("response_0", "response_1"), first)


def helpsteer3(row: Row) -> Parts:
    """`{context, response1, response2, overall_preference}`: HelpSteer3; below 0 response1 is the better one."""
    strength = number_of(row, "overall_preference")
    if not strength:
        raise BadRow("overall_preference is 0: neither response is preferred")
    return _ordered(text_of(row, "context"), row, ("response1", "response2"), strength < 0)


def scored_answers(row: Row) -> Parts:
    """`{question, answer_0, answer_1, score_0, score_1}`: WebGPT's comparisons; the higher score is chosen."""
    question = row.get("question")
    prompt = string_of(question, "full_text") if isinstance(question, dict) else text_of(row, "question")
    first, second = number_of(row, "score_0"), number_of(row, "score_1")
    if first == second:
        raise BadRow("equal scores: neither answer is preferred")
    return _ordered(prompt, row, ("answer_0", "answer_1"), first > second)


def battle(row: Row) -> Parts:
    """`{conversation_a, conversation_b, winner}`: Chatbot Arena; the winner's last message is chosen."""
    winner = str(row.get("winner")).strip().lower()
    if winner not in ("model_a", "model_b"):
        raise BadRow("winner is neither model_a nor model_b")
    sides = [text_of(row, f"conversation_{side}") for side in "ab"]
    if not all(isinstance(side, list) and side for side in sides) or sides[0][:-1] != sides[1][:-1]:
        raise BadRow("the conversations differ before their last message")
    chosen, rejected = sides if winner == "model_a" else sides[::-1]
    return Parts(chosen[:-1], (chosen[-1:], rejected[-1:]))


def votes(row: Row) -> Parts:
    """`{prompt, response_a, response_b, winner_model_a, winner_model_b}`: Arena's 55k; the model that has 1 is chosen.

    The texts are lists of turns there, as JSON. Answers of several turns follow other answers, and make no pair.
    """
    won = [number_of(row, f"winner_model_{side}") for side in "ab"]
    if sorted(won) != [0, 1]:
        raise BadRow("neither model is the winner")
    found = {column: parsed(str(row.get(column))) for column in ("prompt", "response_a", "response_b")}
    if all(isinstance(turns, list) for turns in found.values()):
        if any(len(turns) != 1 for turns in found.values()):
            raise BadRow("the conversations differ before their last message")
        row = {**row, **{column: turns[0] for column, turns in found.items()}}
    prompt, *answers = (string_of(row, column) for column in found)
    return Parts(prompt, tuple(answers if won[0] else answers[::-1]))


def two_responses(row: Row) -> Parts:
    """`{prompt, response_a, response_b, winner}`; the winner is a name or a letter, or 1 for a and 2 for b."""
    first = _names_first(row, "winner", "ab", "12")
    return _ordered(text_of(row, "prompt"), row, ("response_a", "response_b"), first)


def numbered_responses(row: Row) -> Parts:
    """`{prompt, response_1, response_2, winner}`, whose winner is 1, 2, or a name that ends so."""
    first = _names_first(row, "winner", "12")
    return _ordered(text_of(row, "prompt"), row, ("response_1", "response_2"), first)


def numbered_outputs(row: Row) -> Parts:
    """`{instruction, input, output_1, output_2, preference}`: AlpacaFarm; preference is 1 or 2."""
    first = _names_first(row, "preference", "12")
    return _ordered(instruction_of(row), row, ("output_1", "output_2"), first)


def names_a_side(row: Row) -> bool:
    """Whether the winner of a row is a name, a letter or a number of one of two responses, or a tie of both."""
    winner = str(row["winner"]).strip().lower()
    return bool(_SIDE.fullmatch(winner)) or winner.startswith(("tie", "both", "neither", "true", "false"))


def _names_first(row: Row, column: str, *pairs: str) -> bool:
    """Whether a cell names the first of two responses.

    Args:
        pairs: the letters or numbers by which both may be named, as "ab".
    """
    if is_null(row.get(column)):
        raise BadRow(f"no {column}")
    found = _SIDE.fullmatch(str(row[column]).strip().lower())
    pair = next((pair for pair in pairs if found and found[1] in pair), None)
    if found is None or pair is None:
        raise BadRow(f"{column} names neither response")
    return found[1] == pair[0]


def ranked_answers(row: Row) -> Parts:
    """`{prompt, answers}`: Nectar; of the answers {answer, rank} the one of the lowest rank meets the highest."""
    return _best_and_worst(string_of(row, "prompt"), row["answers"], "answer", "rank", sign=-1)


def rated_completions(row: Row) -> Parts:
    """`{instruction, completions}`: UltraFeedback; the response of the highest overall_score meets the lowest."""
    return _best_and_worst(instruction_of(row), row["completions"], "response", "overall_score", sign=1)


def is_ranked(value: Any, *keys: str) -> bool:
    """Whether a cell is a list of objects with these keys."""
    return (
        isinstance(value, list) and len(value) > 0 and all(isinstance(v, dict) and set(keys) <= v.keys() for v in value)
    )


def _best_and_worst(prompt: str, answers: Any, text: str, score: str, sign: int) -> Parts:
    if not is_ranked(answers, text, score):
        raise BadRow(f"the completions are not a list of objects with {text} and {score}")
    usable = [answer for answer in answers if not is_null(answer[score]) and not is_null(answer[text])]
    if len(usable) < 2:
        raise BadRow(f"fewer than two completions with a {score}")
    by_score = [sign * number_of(answer, score) for answer in usable]
    best, worst = max(by_score), min(by_score)
    if best == worst or not math.isfinite(best - worst):
        raise BadRow(f"equal {score}: no completion is preferred")
    chosen, rejected = usable[by_score.index(best)], usable[by_score.index(worst)]
    return Parts(prompt, (string_of(chosen, text), string_of(rejected, text)))


def _ordered(prompt: Text, row: Row, columns: tuple[str, str], first: bool) -> Parts:
    chosen, rejected = columns if first else columns[::-1]
    return Parts(prompt, (text_of(row, chosen), text_of(row, rejected)))
