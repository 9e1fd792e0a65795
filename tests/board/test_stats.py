import gzip
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.board.leaderboard import (
    COLUMNS,
    board_title,
    leaderboard,
    read_leaderboard,
    write_leaderboard,
)
from eval.board.standings import pairs_of_models
from eval.board.terminal import terminal_table
from eval.stats.intervals import win_rate_interval
from eval.stats.paired_differences import paired_differences
from eval.stats.verbosity import verbosity
from eval.stats.win_rate import by_prompt, win_rates
from otpo.errors import UserError

preferences = st.lists(
    st.one_of(st.floats(1, 2), st.sampled_from([1.0, 1.5, 2.0, math.nan, 0.0])), min_size=2, max_size=40
)
RECORDED = ("alpaca-7b", "claude-2.1", "gpt4_gamed")


def recorded(folder: Path, name: str) -> list[dict]:
    return json.loads(gzip.open(folder / "alpaca_eval" / name).read())


def verdict_rows(annotations: list[dict], **extra: object) -> pd.DataFrame:
    rows = [
        {
            "task": "alpaca_eval",
            "generator": a["generator_2"],
            "reference": a["generator_1"],
            "index": i,
            "instruction": a["instruction"],
            "instruction_hash": str(i),
            "reference_hash": str(i),
            "order": "reference_first",
            "preference": a["preference"],
            "price_usd": a["price_per_example"],
            **extra,
        }
        for i, a in enumerate(annotations)
    ]
    return pd.DataFrame(rows)


def toy(wins: list[float], *, name: str = "m", order: str = "reference_first", task: str = "t") -> pd.DataFrame:
    rows = [
        {"task": task, "generator": name, "reference": "r", "index": i, "instruction": f"q{i}", "order": order}
        | {"preference": p}
        for i, p in enumerate(wins)
    ]
    return pd.DataFrame(rows)


def outputs_of(lengths: list[int], **extra: object) -> list[dict]:
    return [{"instruction": f"q{i}", "output": "x" * n, **extra} for i, n in enumerate(lengths)]


@given(preferences)
@settings(max_examples=60, deadline=None)
def test_win_rates_are_those_of_alpaca_eval(values):
    from alpaca_eval.metrics import get_winrate

    expected = get_winrate(pd.DataFrame({"preference": values}))
    ours = win_rates(values)
    for key, value in expected.items():
        assert ours[key] == pytest.approx(float(value) if not pd.isna(value) else math.nan, nan_ok=True), key


@given(preferences)
@settings(max_examples=60, deadline=None)
def test_swapping_the_sides_mirrors_the_win_rate(values):
    ours, swapped = win_rates(values), win_rates([3 - v if v else v for v in values])
    if ours["n_total"]:
        assert swapped["win_rate"] == pytest.approx(100 - ours["win_rate"])
        assert swapped["discrete_win_rate"] == pytest.approx(100 - ours["discrete_win_rate"])
    assert (swapped["n_wins"], swapped["n_wins_base"]) == (ours["n_wins_base"], ours["n_wins"])


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_verdicts_give_the_published_board(shared_data, name):
    annotations = recorded(shared_data, f"{name}/annotations.json.gz")
    published = pd.read_csv(shared_data / "alpaca_eval" / "leaderboard.csv", index_col=0).loc[name]
    outputs = {name: recorded(shared_data, f"{name}/model_outputs.json.gz")}
    reference = recorded(shared_data, "reference_gpt4_1106_preview.json.gz")
    board = leaderboard(
        verdict_rows(annotations),
        outputs,
        reference,
        judge="gpt-4-1106-preview",
        protocol="alpaca_eval",
        calibration=shared_data / "alpaca_eval",
    )
    row = board.iloc[0]
    for key in ("win_rate", "standard_error", "discrete_win_rate"):
        assert row[key] == pytest.approx(published[key], abs=5e-5), key
    for key in ("n_wins", "n_wins_base", "n_draws", "n_total", "avg_length"):
        assert row[key] == published[key], key
    assert row["length_controlled_winrate"] == pytest.approx(published["length_controlled_winrate"], abs=0.2)
    assert row["n_failed"] == 0 and pd.isna(row["length_adjusted_winrate"])
    assert row["win_rate_low"] < row["win_rate"] < row["win_rate_high"]
    assert row["judge_price_usd"] == pytest.approx(sum(a["price_per_example"] or 0 for a in annotations))


@given(preferences)
@settings(max_examples=40, deadline=None)
def test_interval_holds_its_estimate_and_is_repeatable(values):
    rates, interval = win_rates(values), win_rate_interval(values)
    if rates["n_total"] == 0:
        assert interval.low is None and interval.note
    else:
        assert interval.low - 1e-9 <= rates["win_rate"] <= interval.high + 1e-9
        assert interval.low >= -1e-9 and interval.high <= 100 + 1e-9
    assert win_rate_interval(values) == interval


def test_both_orders_count_as_one_prompt_and_flips_are_found():
    verdicts = pd.concat([toy([1.9, 1.9, 1.2, math.nan]), toy([1.7, 1.1, 1.4, 1.9], order="model_first")])
    prompts = by_prompt(verdicts)
    assert prompts["preference"].tolist()[:3] == pytest.approx([1.8, 1.5, 1.3])
    assert math.isnan(prompts["preference"][3])
    assert prompts["flipped"].tolist() == [False, True, False, None]
    row = leaderboard(verdicts, {"m": outputs_of([1] * 4)}, outputs_of([1] * 4), judge="j", protocol="p").iloc[0]
    assert (row["n_total"], row["n_failed"]) == (3, 1)
    assert row["flip_rate"] == pytest.approx(100 / 3)


def test_verbosity_tells_winning_by_length_apart():
    numbers = verbosity(
        [1.9, 1.8, 1.2, math.nan], [30, 5, 30, 30], [10, 10, 10, 10], [3, None, 5, 4], [True, False, False, False]
    )
    assert numbers["avg_length"] == 23 and numbers["reference_length"] == 10
    assert numbers["length_ratio"] == pytest.approx(2.375)
    assert numbers["longer_share"] == 75 and numbers["wins_when_longer"] == 50
    assert numbers["win_rate_when_longer"] == pytest.approx(55) and numbers["win_rate_when_shorter"] == pytest.approx(
        80
    )
    assert numbers["avg_tokens"] == 4 and numbers["truncation_rate"] == 25


def test_paired_interval_is_narrower_than_two_separate_ones():
    rng = np.random.default_rng(1)
    difficulty = rng.uniform(0.1, 0.8, 800)
    a, b = 1 + difficulty + 0.05 + rng.normal(0, 0.02, 800), 1 + difficulty + rng.normal(0, 0.02, 800)
    table = pd.concat([
        pd.DataFrame({"name": name, "prompt": range(800), "preference": p, "length": length})
        for name, p, length in (("b", b, 100.0), ("a", a, 130.0))
    ])  # fmt: skip
    row = paired_differences(table).iloc[0]
    assert (row["better"], row["other"], row["n"]) == ("a", "b", 800)
    assert row["low"] < 5 < row["high"] and row["high"] - row["low"] < 1
    separate = win_rate_interval(a)
    assert row["high"] - row["low"] < 0.3 * (separate.high - separate.low)
    assert row["length_difference"] == 30
    assert row["detectable"] < 1


def test_paired_differences_of_models_that_share_no_prompt_or_no_difference():
    same = pd.DataFrame({"name": ["a", "a", "b", "b"], "prompt": [1, 2, 1, 2], "preference": [1.2, 1.8, 1.2, 1.8]})
    row = paired_differences(same).iloc[0]
    assert (
        row["difference"] == 0
        and row["low"] == pytest.approx(-row["high"])
        and row["low"] < -20
        and "same verdicts" in row["note"]
    )
    apart = same.assign(prompt=[1, 2, 3, 4])
    row = paired_differences(apart).iloc[0]
    assert pd.isna(row["difference"]) and row["n"] == 0 and row["note"] == "no prompt in common"


def test_pairs_need_the_same_reference_output():
    verdicts = pd.concat([toy([1.9, 1.9, 1.9]), toy([1.1, 1.1, 1.3], name="n")], ignore_index=True)
    verdicts["instruction_hash"], verdicts["reference_hash"] = verdicts["instruction"], list("abcabX")
    assert pairs_of_models(verdicts).iloc[0]["n"] == 2


@pytest.mark.parametrize("wins", [[2.0], [1.5] * 5, [1.0] * 40, [math.nan] * 3, [1.2, 1.9]])
def test_small_and_degenerate_boards_are_honest(wins, tmp_path):
    n = len(wins)
    board = leaderboard(toy(wins), {"m": outputs_of([4] * n)}, outputs_of([2] * n), judge="j", protocol="p")
    row = board.iloc[0]
    assert list(board) == list(COLUMNS)
    assert row["n_total"] + row["n_failed"] == n
    if row["n_total"]:
        assert row["win_rate_low"] <= row["win_rate"] <= row["win_rate_high"]
    else:
        assert pd.isna(row["win_rate"]) and pd.isna(row["length_adjusted_winrate"])
    assert row["note"]
    terminal_table(board)
    again = read_leaderboard(write_leaderboard(board, tmp_path / "leaderboard.csv"))
    assert list(again) == list(COLUMNS) and again["note"][0] == row["note"]


def test_names_that_look_like_missing_values_survive_the_csv(tmp_path):
    board = leaderboard(
        toy([1.9, 1.2], name="null"), {"null": outputs_of([1, 2])}, outputs_of([1, 2]), judge="1", protocol="p"
    )
    again = read_leaderboard(write_leaderboard(board, tmp_path / "leaderboard.csv"))
    assert again["name"][0] == "null" and again["judge"][0] == "1" and again["win_rate"][0] == board["win_rate"][0]


def test_outputs_are_matched_by_instruction_and_missing_ones_refused():
    reference = outputs_of([10, 20, 30])
    outputs = list(reversed(outputs_of([1, 2, 3], n_tokens=5)))
    board = leaderboard(toy([1.1, 1.6, 1.9])[1:], {"m": outputs}, reference, judge="j", protocol="p")
    assert board["avg_length"][0] == 2 and board["reference_length"][0] == 25
    with pytest.raises(UserError, match="1 are missing"):
        leaderboard(toy([1.1, 1.6, 1.9]), {"m": outputs[1:]}, reference, judge="j", protocol="p")
    with pytest.raises(UserError, match="expected its outputs"):
        leaderboard(toy([1.1]), {"other": outputs}, reference, judge="j", protocol="p")


def test_only_the_official_setting_is_called_alpaca_eval():
    official = ("alpaca_eval", "gpt-4-1106-preview", "alpaca_eval", "gpt4_1106_preview")
    assert board_title(*official) == "AlpacaEval 2"
    for i, other in enumerate(("my prompts", "my-judge", "preference", "my-reference")):
        changed = [other if i == j else value for j, value in enumerate(official)]
        assert other in board_title(*changed) and "AlpacaEval 2" not in board_title(*changed)
