"""Intervals of bounded means: known cases, and how often they hold the truth on boards whose truth is known."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from eval.stats.intervals import HALF, NEAR, mean_intervals, win_rate_interval
from eval.stats.length_control import length_adjusted
from eval.stats.paired_differences import paired_differences
from tests.benchmarks.coverage import KINDS, RATES, covered, rejected


@pytest.mark.parametrize(("wins", "n"), [(1, 10), (3, 10), (9, 10), (50, 100), (99, 100), (400, 800)])
def test_of_wins_and_losses_it_is_jeffreys_interval(wins, n):
    low, high = mean_intervals([1.0] * wins + [0.0] * (n - wins), (0.0, 1.0), HALF)
    expected = beta.ppf([0.025, 0.975], wins + 0.5, n - wins + 0.5)
    assert [low[0], high[0]] == pytest.approx(expected, rel=2e-2 if wins in (1, 9) else 2e-3)


def test_of_many_graded_values_it_is_the_normal_interval():
    values = np.random.default_rng(0).beta(2, 3, 20_000)
    low, high = mean_intervals(values, (0.0, 1.0), NEAR)
    half = 1.959964 * values.std() / np.sqrt(len(values))
    assert [low[0], high[0]] == pytest.approx([values.mean() - half, values.mean() + half], abs=half / 50)


@pytest.mark.parametrize("wins", [[2.0] * 12, [2.0] * 11 + [2 - 1e-9], [2 - 1e-12 * i for i in range(12)]])
def test_nearly_equal_verdicts_give_no_false_certainty(wins):
    """A bootstrap of [2.0] * 11 and one 2 - 1e-9 said 100.0 to 100.0."""
    interval = win_rate_interval(wins)
    assert interval.low == pytest.approx(79.4, abs=0.5) and interval.high == pytest.approx(100, abs=1e-6)
    mirrored = win_rate_interval([3 - value for value in wins])
    assert (mirrored.low, mirrored.high) == pytest.approx((100 - interval.high, 100 - interval.low), abs=1e-6)
    adjusted = length_adjusted(wins, [10] * 12, [20, 5] * 6)[1]
    assert adjusted.low < 95 and adjusted.high > 99


@pytest.mark.parametrize("n", [100, 805, 5000, 50_000])
def test_many_equal_verdicts_give_a_narrow_interval(n):
    """What is not known of them is about three verdicts in n, wherever they are equal."""
    for value in np.linspace(1.03, 1.97, 30):
        interval = win_rate_interval(np.full(n, value))
        assert 250 < (interval.high - interval.low) * n < 280, value
        assert interval.low < 100 * (value - 1) < interval.high


def test_one_verdict_and_equal_verdicts_say_so():
    one, ten = win_rate_interval([2.0]), win_rate_interval([1.0] * 10)
    assert one.note == "one verdict" and one.low < 25 and one.high == 100
    assert ten.note.startswith("all 10 verdicts are equal") and ten.low == 0 and 20 < ten.high < 30


@pytest.mark.parametrize("gap", [1e-7, 1e-5, 0.0])
def test_a_difference_of_nothing_is_not_settled(gap):
    """The two were called settled at +0.00001 points, because all differences were nearly equal."""
    noise = 1e-9 * np.random.default_rng(0).normal(size=50)
    table = pd.DataFrame(
        {"name": ["a"] * 50 + ["b"] * 50, "prompt": [*range(50)] * 2}
        | {"preference": np.concatenate([1.5 + gap + noise, np.full(50, 1.5)])}
    )
    row = paired_differences(table).iloc[0]
    assert row["low"] < -1 and row["high"] > 1 and row["low"] < row["difference"] < row["high"]


@given(
    st.lists(st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0, 0.5, np.nan])), min_size=5, max_size=5),
             min_size=1, max_size=6)
)  # fmt: skip
def test_rows_are_apart_ends_hold_the_mean_and_more_of_the_same_narrows(rows):
    values = np.array(rows)
    low, high = mean_intervals(values, (0.0, 1.0), NEAR)
    alone = [mean_intervals(row[~np.isnan(row)], (0.0, 1.0), NEAR) for row in values]
    for row, end, start, other in zip(values, high, low, alone, strict=True):
        if np.isnan(row).all():
            assert np.isnan(start) and np.isnan(end)
            continue
        assert (start, end) == pytest.approx((other[0][0], other[1][0]), abs=1e-6)
        assert 0 <= start <= np.nanmean(row) + 1e-12 and np.nanmean(row) - 1e-12 <= end <= 1
        again = mean_intervals(np.tile(row, 9), (0.0, 1.0), NEAR)
        assert again[1][0] - again[0][0] < end - start


def test_bounds_only_scale():
    values = np.random.default_rng(0).uniform(-1, 1, (3, 40))
    low, high = mean_intervals(values, (-1.0, 1.0))
    scaled = mean_intervals(100 * values, (-100.0, 100.0))
    assert np.allclose(scaled[0], 100 * low, atol=1e-5) and np.allclose(scaled[1], 100 * high, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_hold_the_truth_and_tests_reject_it_as_often_as_they_say(kind):
    assert 92 <= covered(kind, 60, 0.9, 500) <= 99
    assert 1.5 <= rejected(kind, 60, 0.5, 500) <= 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_coverage_on_many_boards(kind):
    """The table of docs/judging.md. A percent of 4,300 boards has a standard error of 0.33."""
    for rate in RATES:
        assert 94 - 0.7 <= covered(kind, 800, rate, 4300) <= 97.5, rate
        assert 93 <= covered(kind, 100, rate, 4300) <= 98.5, rate
    for rate in (0.1, 0.3, 0.5):
        assert 3.5 <= rejected(kind, 800, rate, 4300) <= 6, rate
