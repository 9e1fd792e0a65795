"""Which models are told apart: the level of the claims on simulated boards, missing verdicts, and the files."""

import json

import numpy as np
import pandas as pd
import pytest

from eval.board.leaderboard import leaderboard, read_leaderboard, write_leaderboard
from eval.board.standings import groups_sentences, pairs_of_models, standings
from eval.stats.intervals import HALF, mean_intervals
from eval.stats.rank_groups import compare, holm, no_difference, ranks
from tests.benchmarks.coverage import KINDS, chances

BOARDS = 300


def verdicts_of(chance: dict[str, list[float]]) -> pd.DataFrame:
    rows = [
        {"task": "t", "generator": name, "reference": "r", "index": i, "instruction": f"q{i}", "order": "none"}
        | {"preference": 1 + value}
        for name, values in chance.items()
        for i, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def board_of(chance: dict[str, list[float]]) -> pd.DataFrame:
    verdicts = verdicts_of(chance)
    rows = [{"instruction": text, "output": "x"} for text in dict.fromkeys(verdicts["instruction"])]
    return leaderboard(verdicts, dict.fromkeys(chance, rows), rows, judge="j", protocol="p")


@pytest.mark.parametrize("kind", ["wins and losses", "near 0 and 1, as of GPT-4", "both orders"])
def test_tests_of_no_difference_reject_five_percent(kind):
    """2,000 boards of two equally good models: five percent, with a standard error of half a percent."""
    rng = np.random.default_rng(1)
    _, prompts = chances(rng, 0.4, 2000, 250)
    p = no_difference(KINDS[kind](rng, prompts) - KINDS[kind](rng, prompts))
    assert 0.04 - 0.01 <= np.mean(p < 0.05) <= 0.06 + 0.005


def test_the_test_rejects_where_the_interval_leaves_out_zero():
    rng = np.random.default_rng(2)
    rows = np.clip(rng.normal(rng.normal(0, 0.1, (400, 1)), 0.4, (400, 40)), -1, 1)
    rows[rng.random(rows.shape) < 0.1] = np.nan
    rows[:3] = [[1.0] * 40, [0.0] * 40, [1e-9] * 40]
    low, high = mean_intervals(rows, (-1.0, 1.0), HALF)
    p = no_difference(rows)
    assert ((p < 0.05) == ((low > 0) | (high < 0))).all() and 0.1 < np.mean(p < 0.05) < 0.9
    assert p[0] < 1e-6 and p[1] == 1 and p[2] == pytest.approx(1, abs=1e-3)


def test_no_number_of_prompts_shows_a_difference_of_rounding_errors():
    rng = np.random.default_rng(5)
    for n in (7, 30, 100):
        thirds = rng.choice([0, 1 / 3, 2 / 3, 0.1, 0.7], n)
        equal_means, equal_steps = [thirds, rng.permutation(thirds)], [thirds + 0.3, thirds]
        for pair in (equal_means, equal_steps):
            assert np.isnan(compare(pair).prompts_needed).all()
    assert compare([[0.9, 0.2], [0.3, 0.1]]).prompts_needed[0, 1] > 0


@pytest.mark.parametrize("prompts", [1, 3, 500, 5000])
def test_a_difference_too_small_to_matter_is_no_difference(prompts):
    rng = np.random.default_rng(4)
    around_zero = rng.choice([-1.0, -0.3, 0.0, 0.3, 1.0], prompts)
    around_zero -= around_zero.mean()
    for tiny in np.logspace(-13, -4, 60):
        alone = np.zeros(prompts)
        alone[0] = tiny
        assert (no_difference([0.8 * around_zero + tiny / prompts**0.5, alone]) > 0.98).all(), tiny


def drawn(rng: np.random.Generator, truth: np.ndarray, n: int) -> np.ndarray:
    """(m, n) wins and losses on prompts whose difficulty the models have in common."""
    odds = np.log(truth / (1 - truth))[:, None] + rng.normal(0, 1, n)
    return (rng.random((len(truth), n)) < 1 / (1 + np.exp(-odds))).astype(float)


def test_groups_and_ranks_hold_the_truth_at_their_level():
    rng, truth = np.random.default_rng(3), np.array([0.8, 0.62, 0.6, 0.6, 0.45, 0.45, 0.45, 0.25])
    best, worst = 1 + (truth[:, None] > truth).sum(axis=0), 8 - (truth[:, None] < truth).sum(axis=0)
    right, ordered, split = [], [], []
    for _ in range(BOARDS):
        better = compare(drawn(rng, truth, 150)).better
        low, high, group = ranks(better)
        right.append(((low <= best) & (worst <= high)).all())
        ordered.append(all(truth[i] > truth[j] for i in range(8) for j in range(8) if group[i] < group[j]))
        split.append((better[0, 7], group[7] > group[0]))
        assert all(group[i] == group[j] for i, j in np.argwhere(~(better | better.T)))
    # the standard error is 1.3 %
    assert np.mean(right) >= 0.92 and np.mean(ordered) >= 0.92
    told, apart = np.mean(split, axis=0)
    assert told > 0.99 and apart > 0.6  # and they say something


def test_boards_of_equal_models_are_split_in_at_most_five_percent():
    rng = np.random.default_rng(4)
    wrong = [compare(drawn(rng, np.full(6, 0.5), 150)).better.any() for _ in range(BOARDS)]
    assert 0 < np.mean(wrong) <= 0.05 + 0.03


def test_holm_is_that_of_r():
    """p.adjust(c(0.04, 0.01, 0.03, 0.02, 0.05), "holm")"""
    assert holm([0.04, np.nan, 0.01, 0.03, 0.02, 0.05]) == pytest.approx([0.09, 1, 0.05, 0.09, 0.08, 0.09])
    assert holm([0.6, 0.7]).tolist() == [1, 1]


def test_ranks_of_a_chain_a_circle_and_clear_groups():
    def claims(m, *pairs):
        better = np.zeros((m, m), dtype=bool)
        for row, column in pairs:
            better[row, column] = True
        return [values.tolist() for values in ranks(better)]

    assert claims(3, (0, 2)) == [[1, 1, 2], [2, 3, 3], [1, 1, 1]]
    assert claims(3, (0, 1), (1, 2), (2, 0))[2] == [1, 1, 1]
    assert claims(4, (0, 2), (0, 3), (1, 2), (1, 3)) == [[1, 1, 3, 3], [2, 2, 4, 4], [1, 1, 2, 2]]
    assert claims(2, (1, 0))[2] == [2, 1]


def test_missing_verdicts_leave_open_what_they_could_change():
    first = [1.0] * 80 + [0.0] * 20
    second = [1.0] * 60 + [0.0] * 40
    whole = board_of({"a": first, "b": second})
    assert whole["group"].tolist() == [1, 2] and whole["rank"].tolist() == [1, 2]
    assert (
        whole["win_rate_if_missing_lost"].tolist()
        == whole["win_rate_if_missing_won"].tolist()
        == pytest.approx([80, 60])
    )
    lacking = [*first[:45], *[np.nan] * 15, *first[60:]]  # 65 of 85 without them
    board = board_of({"a": lacking, "b": second})
    assert board["group"].tolist() == [1, 1] and board["rank_worst"].tolist() == [2, 2]
    assert board["win_rate"][0] == pytest.approx(100 * 65 / 85)
    assert board["win_rate_if_missing_lost"].tolist() == pytest.approx([65, 60])
    assert board["win_rate_if_missing_won"].tolist() == pytest.approx([80, 60])
    found = standings(verdicts_of({"a": lacking, "b": second}))
    assert found.compared.p[0, 1] < 0.001 < 0.05 < found.compared.p_missing[0, 1]
    said = " ".join(groups_sentences(board, found))
    assert "15 verdicts missing: one order of two models is not claimed, and groups are merged" in said


def test_a_few_missing_verdicts_do_not_hide_a_clear_order():
    first, second = [1.0] * 90 + [0.0] * 10, [1.0] * 20 + [0.0] * 80
    board = board_of({"a": [np.nan, *first[1:]], "b": [*second[:-1], np.nan]})
    assert board["group"].tolist() == [1, 2]
    assert board["win_rate_if_missing_lost"].tolist() == pytest.approx([89, 20])
    assert board["win_rate_if_missing_won"].tolist() == pytest.approx([90, 21])


def test_models_without_verdicts_or_common_prompts_have_no_order():
    board = board_of({"a": [1.0] * 40 + [0.0], "b": [np.nan] * 41, "c": [0.0] * 41})
    assert board["name"].tolist() == ["a", "c", "b"]
    assert board["rank"].tolist()[:2] == [1, 2] and pd.isna(board["rank"][2]) and pd.isna(board["group"][2])
    apart = verdicts_of({"a": [1.0] * 40, "b": [0.0] * 40})
    apart.loc[apart["generator"] == "b", "index"] += 100
    assert standings(apart).compared.n[0, 1] == 0 and not standings(apart).compared.better.any()


def test_detectable_differences_and_prompts_needed_are_those_of_the_paired_test():
    """Differences of 0 and 1 on 100 prompts each half the time: standard deviation 50.25 points."""
    a, b = [1.0] * 100, [1.0, 0.0] * 50
    row = pairs_of_models(verdicts_of({"a": a, "b": b})).iloc[0]
    assert row["difference"] == 50 and row["detectable"] == pytest.approx(2.801585 * 50.2519 / 10, rel=1e-4)
    assert row["prompts_needed"] == np.ceil(100 * (row["detectable"] / 50) ** 2) == 8
    board = board_of({"a": a, "b": b})
    assert board["detectable_difference"][0] == pytest.approx(row["detectable"]) and board["prompts_needed"][0] == 8
    assert pd.isna(board["detectable_difference"][1])


def test_differences_shown_are_the_next_ones_and_those_to_the_best():
    table = pairs_of_models(verdicts_of({f"m{i}": [1.0] * (50 - 10 * i) + [0.0] * (10 * i) for i in range(4)}))
    assert list(zip(table["better"], table["other"], strict=True)) == [
        ("m0", "m1"),
        ("m1", "m2"),
        ("m2", "m3"),
        ("m0", "m2"),
        ("m0", "m3"),
    ]


def test_the_same_board_as_csv_json_and_markdown(tmp_path):
    board = board_of({"a_1": [1.0] * 90 + [0.0] * 10, "b|2": [0.5] * 100, "none": [np.nan] * 100})
    write_leaderboard(board, tmp_path / "leaderboard.csv")
    rows = json.loads((tmp_path / "leaderboard.json").read_text())
    again = read_leaderboard(tmp_path / "leaderboard.csv")
    assert [list(row) for row in rows] == [list(board)] * 3
    for row, other in zip(rows, again.to_dict("records"), strict=True):
        for column, value in row.items():
            same = pd.isna(other[column]) or other[column] == "" if value is None else other[column] == value
            assert same or value == pytest.approx(other[column]), column
    assert [row["rank"] for row in rows] == [1, 2, None] and [row["group"] for row in rows] == [1, 2, None]
    lines = (tmp_path / "leaderboard.md").read_text().splitlines()
    assert lines[0] == "**t, against r**" and lines[4].startswith("| 1 | 1 | a\\_1 | 90.0 | ")
    assert lines[5].startswith("| 2 | 2 | b\\|2 | 50.0 | ") and lines[6].startswith("| n/a | n/a | none | n/a | ")
