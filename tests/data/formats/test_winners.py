"""Two responses and a winner: names, letters and numbers that are clear are read, and others refused with a mapping."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from otpo.data.convert import convert
from otpo.errors import UserError

LETTERS = {"prompt": "Is it?", "response_a": "The first.", "response_b": "The second."}
FROM_0 = {"prompt": "Is it?", "response_0": "The first.", "response_1": "The second."}
FROM_1 = {"question": "Is it?", "answer_1": "The first.", "answer_2": "The second."}
FARM = {"instruction": "Is it?", "input": "", "output_1": "The first.", "output_2": "The second."}
VOTES = {
    "id": 1, "model_a": "x", "model_b": "y", "prompt": json.dumps(["Is it?"]),
    "response_a": json.dumps(["The first."]), "response_b": json.dumps(["The second."]),
}  # fmt: skip


def chosen(rows, **how):
    examples, report = convert(rows, **how)
    assert all(example.prompt == "Is it?" for example in examples)
    assert all(set(example.completions) == {"The first.", "The second."} for example in examples)
    return [example.completions[0] for example in examples], report


@pytest.mark.parametrize(
    ("row", "column", "winners"),
    [
        (LETTERS, "winner", [1, 2]),
        (LETTERS, "preference", ["1", "2"]),
        (LETTERS, "winner", [1.0, 2.0]),
        (LETTERS, "winner", ["Model A", "assistant_b"]),
        (FROM_0, "winner", [0, 1]),
        (FROM_0, "better", ["0", "response_1"]),
        (FROM_1, "winner", [1, 2]),
        (FROM_1, "preference", ["answer_1", "2"]),
        (FARM, "preference", [1, 2]),
    ],
)
def test_a_clear_winner_is_chosen(row, column, winners):
    assert chosen([row | {column: each} for each in winners])[0] == ["The first.", "The second."]


def test_a_winner_that_is_always_one_is_clear_where_the_names_count():
    for row, number, expected in ((FROM_0, 1, "The second."), (FROM_1, 1, "The first.")):
        assert chosen([row | {"winner": number}] * 2)[0] == [expected] * 2


@pytest.mark.parametrize(
    ("row", "winners", "found"),
    [
        (LETTERS, [0, 1], "0, 1"),
        (LETTERS, ["0", "1"], "0, 1"),
        (LETTERS, [1, 1], "1"),
        (LETTERS, [True, False], "false, true"),
        (LETTERS, ["True", "False"], "false, true"),
        (LETTERS, [0, 1, 2], "0, 1, 2"),
        (LETTERS, [-1, 1], "-1, 1"),
        (FROM_0, [1, 2], "1, 2"),
        (FROM_1, [0, 1], "0, 1"),
        (FROM_1, [-2, 1, 2], "-2, 1, 2"),
        (FARM, [0, 1], "0, 1"),
    ],
)
def test_numbers_that_may_mean_several_things_are_refused(row, winners, found):
    column = "preference" if row is FARM else "winner"
    with pytest.raises(UserError, match=f"found {found}, which can be read in several ways.*write a, b and tie"):
        convert([row | {column: each} for each in winners])


@pytest.mark.parametrize(
    ("winners", "orders"),
    [
        ([0, 1], [["The second.", "The first."], ["The first.", "The second."]]),
        (["0", "1"], [["The second.", "The first."], ["The first.", "The second."]]),
        ([False, True], [["The second.", "The first."]]),
    ],
)
def test_each_mapping_that_a_refusal_proposes_reads_the_file(winners, orders):
    rows = [LETTERS | {"winner": each} for each in winners]
    with pytest.raises(UserError) as refusal:
        convert(rows)
    ways = [yaml.safe_load(way) for way in re.findall(r"data\.columns: (\{.*?\})", str(refusal.value))]
    assert [chosen(rows, columns=way)[0] for way in ways] == orders


def test_ties_are_left_out():
    found, report = chosen([FROM_1 | {"winner": each} for each in ("answer_2", "tie")])
    assert found == ["The second."] and report.problems == {"winner names neither response": [1]}


def test_votes_of_the_arena_are_read_where_they_are_of_one_turn():
    won_by_b = VOTES | {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}
    turns = {"prompt": '["Is it?", "So?"]', "response_a": '["Yes.", "So."]', "response_b": '["No.", "No."]'}
    found, report = chosen([won_by_b, won_by_b | {"winner_model_b": 0, "winner_tie": 1}, won_by_b | turns])
    assert found == ["The second."] and report.format == "arena-votes"
    assert report.problems == {
        "neither model is the winner": [1],
        "the conversations differ before their last message": [2],
    }


# ---- beside a chosen and a rejected answer ----

PAIR = {"prompt": "Is it?", "chosen": "The first.", "rejected": "The second."}


@pytest.mark.parametrize(
    ("column", "cells"),
    [
        ("flipped", [True, False]),
        ("is_swapped", ["no", "yes"]),
        ("label", [0, 1]),
        ("label", ["chosen", "rejected"]),
        ("preference", ["A", "B"]),
        ("winner", [1.0, 2.0]),
        ("better", ["rejected", "rejected"]),
        ("human_preference", ["response_a", "tie", "response_b"]),
    ],
)
def test_a_column_that_may_turn_pairs_round_is_refused_with_ways_out(column, cells):
    rows = [PAIR | {column: cell} for cell in cells]
    with pytest.raises(UserError, match=rf"the column {column} has .* may say that it is the worse one") as error:
        convert(rows)
    assert f"data.columns: {{{column}: null}}" in str(error.value)
    assert chosen(rows, columns={column: None})[0] == ["The first."] * len(cells)


@pytest.mark.parametrize(
    ("column", "cells", "first"),
    [
        ("flipped", [True, False], ["The second.", "The first."]),
        ("label", [1, 0], ["The first.", "The second."]),
    ],
)
def test_the_mapping_that_a_turned_pair_is_refused_with_turns_it(column, cells, first):
    rows = [PAIR | {column: cell} for cell in cells]
    with pytest.raises(UserError) as error:
        convert(rows)
    mapping = re.search(r"If 1 or true says .*?data.columns: (\{.*?\})\.", str(error.value))
    assert chosen(rows, columns=yaml.safe_load(mapping[1]))[0] == first
    if column == "label":
        mapping = re.search(r"If 0 is chosen .*?data.columns: (\{.*?\})\.", str(error.value))
        assert chosen(rows, columns=yaml.safe_load(mapping[1]))[0] == first[::-1]


@pytest.mark.parametrize(
    ("column", "cells"),
    [("flipped", [False, False]), ("label", ["maths", "code"]), ("label", [0, 3]), ("label", [1, 1]),
     ("status", ["swapped", "unchanged"])],
)  # fmt: skip
def test_a_column_that_says_nothing_of_the_sides_is_ignored(column, cells):
    assert tuple(chosen([PAIR | {column: cell} for cell in cells])[1].ignored) == (column,)


def test_a_winner_of_two_responses_beside_their_pair_is_ignored():
    rows = [PAIR | {"response_a": "x", "response_b": "y", "winner": each} for each in ("a", "b")]
    assert "winner" in chosen(rows)[1].ignored
