"""Sentences, list items, what summaries copy, and win rates by length ratio: by hand, and against a plain count."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.board.leaderboard import leaderboard
from eval.stats.win_rate import win_rates
from eval.stats.wording import BUCKETS, copy_rate, list_items_of, sentences_of, win_rates_by_length, wording


@pytest.mark.parametrize(
    ("text", "sentences", "items"),
    [
        ("One. Two! Three? Four", 3, 0), ("No end", 1, 0), ("", 0, 0), ("---\n\n", 0, 0),
        ("It is 3.5 m. \"Yes.\"", 2, 0), ("1. First.\n2) Second\n- third", 3, 3), ("# Title\n\nText.", 2, 0),
        ("\u4f60\u597d\u3002\u518d\u89c1\u3002", 2, 0),
    ],
)  # fmt: skip
def test_sentences_and_items_are_counted(text, sentences, items):
    assert (sentences_of(text), list_items_of(text)) == (sentences, items)


def test_a_summary_is_measured_against_its_post():
    post = "The cat sat on the mat and looked at the dog."
    assert copy_rate("the cat sat on a mat", post) == pytest.approx(2 / 4)  # the cat sat, cat sat on
    assert copy_rate(post, post) == 1 and copy_rate("A bird flew off", post) == 0 and copy_rate("cat", post) is None
    found = wording(["The cat sat.", "x"], [post, post])
    assert found["compression_ratio"] == pytest.approx(2 * len(post) / 13) and found["copy_rate"] == 100
    assert set(wording(["a"])) == {"avg_sentences", "avg_list_items"}
    assert wording([], [])["compression_ratio"] is None


@given(st.lists(st.tuples(st.floats(1, 2) | st.just(np.nan), st.integers(0, 40), st.integers(0, 40)), max_size=30))
def test_buckets_are_a_partition(rows):
    preference, mine, theirs = np.array(rows, dtype=float).reshape(-1, 3).T
    found = win_rates_by_length(preference, mine, theirs)
    known = preference[~np.isnan(preference)]
    assert sum(found[f"n_ratio_{name}"] for *_, name in BUCKETS) == len(known)
    total = sum((found[f"win_rate_ratio_{name}"] or 0) * found[f"n_ratio_{name}"] for *_, name in BUCKETS)
    assert total == pytest.approx(win_rates(preference)["win_rate"] * len(known) if len(known) else 0, abs=1e-6)


def test_a_bucket_holds_its_lower_end():
    found = win_rates_by_length([2.0, 1.0, 1.5], [5, 8, 20], [10, 10, 10])
    assert found["win_rate_ratio_0.5_to_0.8"] == 100 and found["win_rate_ratio_0.8_to_1.25"] == 0
    assert found["win_rate_ratio_over_2"] == 50 and found["n_ratio_under_0.5"] == 0


def test_a_board_of_summaries_has_them(tmp_path):
    import pandas as pd

    rows = {who: [{"instruction": f"Post {i} is about a cat that sat.", "output": f"{who} {i}. A cat that sat.",
                   "generator": who} for i in range(4)] for who in ("model", "reference")}  # fmt: skip
    asked = [row["instruction"] for row in rows["model"]]
    about = {"task": "t", "generator": "model", "reference": "reference"}
    verdicts = pd.DataFrame({**about, "index": range(4), "instruction": asked, "preference": 2.0})
    for protocol, there in (("summary", True), ("preference", False)):
        board = leaderboard(verdicts, {"model": rows["model"]}, rows["reference"], judge="j", protocol=protocol)
        [row] = board.to_dict("records")
        assert row["avg_sentences"] == 2 and row["win_rate_ratio_0.8_to_1.25"] == 100
        assert (not pd.isna(row["copy_rate"])) is there
