"""A judge who prefers a place is found, said, and told from one who prefers a model."""

import numpy as np
import pandas as pd
import pytest
from test_stats import outputs_of

from eval.board.leaderboard import leaderboard
from eval.board.sentences import claim, explanation
from eval.board.terminal import terminal_notes
from eval.judge.verdicts import model_first
from eval.stats.position_bias import bias_note, position_bias


def verdicts(n, chance, lean, both=False, seed=0):
    """Of a judge who prefers the model with this chance, and in the share `lean` of cases just the first output."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        prefers = rng.random() < chance
        for first in (False, True) if both else (model_first(f"q{i}"),):
            wins = first if rng.random() < lean else prefers
            order = "model_first" if first else "reference_first"
            rows.append({"task": "t", "generator": "m", "reference": "r", "index": i, "instruction": f"q{i}"}
                        | {"order": order, "preference": 1.0 + wins, "key": "k"})  # fmt: skip
    return pd.DataFrame(rows)


def board_of(frame, n):
    lengths = [i % 5 + 3 for i in range(n)]
    return leaderboard(frame, {"m": outputs_of(lengths)}, outputs_of(lengths[::-1]), judge="j", protocol="p")


def test_a_judge_who_always_names_the_first_is_said_to():
    frame = verdicts(52, 0.5, 1.0)
    bias = position_bias(frame)
    assert (bias.first_share, bias.shown_first, bias.shown_second) == (100, 100, 0)
    assert bias.found and bias.low > 80
    board = board_of(frame, 52)
    row = board.iloc[0]
    assert row["win_rate"] == 100 * np.mean([model_first(f"q{i}") for i in range(52)])
    assert (row["first_share"], row["win_rate_shown_first"], row["win_rate_shown_second"]) == (100, 100, 0)
    assert "50.0% if both count alike: ask in both orders" in row["note"]
    assert "but its judge prefers the output shown first" in claim(board, pd.DataFrame())
    assert "win 100.0% where they are shown first and 0.0%" in " ".join(explanation(board, pd.DataFrame()))
    assert any("prefers the output shown first" in note for note in terminal_notes(board))


def test_a_judge_who_always_names_the_second_is_said_to():
    frame = verdicts(60, 0.5, 1.0).assign(preference=lambda f: 3 - f["preference"])
    assert position_bias(frame).first_share == 0
    assert "prefers the output shown second" in bias_note(position_bias(frame))
    both = verdicts(60, 0.5, 1.0, both=True).assign(preference=lambda f: 3 - f["preference"])
    assert "prefers the output shown second (P(first) 0.0%)" in bias_note(position_bias(both))


def test_a_good_model_is_no_bias():
    for seed in range(5):
        bias = position_bias(verdicts(200, 0.9, 0.0, seed=seed))
        assert not bias.found and bias_note(bias) == ""
    board = board_of(verdicts(200, 0.9, 0.0), 200)
    assert "wins" in claim(board, pd.DataFrame()) and "judge" not in claim(board, pd.DataFrame())


def test_both_orders_cancel_it_out_and_say_how_large_it_is():
    frame = verdicts(200, 0.7, 0.4, both=True)
    bias = position_bias(frame)
    assert bias.both_orders and bias.found and bias.first_share == pytest.approx(70, abs=6)
    assert "cancels out" in bias_note(bias)
    board = board_of(frame, 200)
    assert board.iloc[0]["win_rate"] == pytest.approx(62, abs=8) and "but its judge" not in claim(board, pd.DataFrame())


def test_what_cannot_be_told_is_not_guessed():
    one_place = verdicts(20, 0.8, 0.0).assign(order="reference_first")
    assert position_bias(one_place).first_share is None and "always stood second" in bias_note(position_bias(one_place))
    scored = verdicts(20, 0.8, 0.0).assign(order="none")
    assert bias_note(position_bias(scored)) == "" and position_bias(scored.drop(columns="order")).low is None
    assert position_bias(verdicts(20, 0.8, 0.0).assign(key="")).first_share is None
    assert position_bias(verdicts(20, 0.8, 0.0).assign(preference=np.nan)).shown_first is None


@pytest.mark.parametrize(("lean", "low", "high"), [(0.0, 0, 12), (0.3, 50, 100)])
def test_the_bias_is_found_as_often_as_it_should(lean, low, high):
    found = [position_bias(verdicts(100, 0.7, lean, seed=seed)).found for seed in range(60)]
    assert low <= 100 * np.mean(found) <= high
