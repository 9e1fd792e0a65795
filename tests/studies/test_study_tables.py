"""The figures of runs that differ in their seed alone: means, intervals over seeds, paired differences, pages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval import layout
from eval.studies.figures import run_figures
from eval.studies.markdown import study_text
from eval.studies.seeds import by_label, differences, mean_over_seeds

T_4 = 2.7764451  # 97.5 % quantile of Student's t with 4 degrees of freedom, from a table


def test_the_interval_is_students_t() -> None:
    found = mean_over_seeds([1.0, 2.0, 3.0, 4.0, 5.0])
    half = T_4 * np.sqrt(2.5) / np.sqrt(5)
    assert (found.value, found.n) == (3.0, 5)
    assert found.low == pytest.approx(3 - half) and found.high == pytest.approx(3 + half)
    alone = mean_over_seeds([7.0])
    assert (alone.value, alone.low, alone.high, alone.n) == (7.0, None, None, 1)


@pytest.mark.parametrize("value", [0.0, 100.0, 100 / 3])
def test_seeds_that_agree_give_no_interval(value: float) -> None:
    """It would be as narrow as a rounding error, and every difference more than another seed would have done."""
    agreed = [value, value * (1 + 1e-15), value]
    assert (mean_over_seeds(agreed).low, mean_over_seeds(agreed).high) == (None, None)
    found = differences(table({"dpo": [50.0, 50.0], "otpo": [50.1, 50.1]}), "otpo", "dpo")["facts: win_rate"]
    assert found.value == pytest.approx(0.1) and found.low is None


def test_the_interval_covers_the_mean_of_normal_seeds() -> None:
    random = np.random.default_rng(0)
    inside = 0
    for draws in random.normal(50, 3, size=(2000, 5)):
        found = mean_over_seeds(draws.tolist())
        assert found.low is not None and found.high is not None
        inside += found.low <= 50 <= found.high
    assert inside / 2000 == pytest.approx(0.95, abs=0.015)


def table(values: dict[str, list[float]], figure: str = "facts: win_rate") -> pd.DataFrame:
    rows = [
        {"regime": "plain", "seed": seed, "label": label, "figure": figure, "value": value}
        for label, figures in values.items()
        for seed, value in enumerate(figures, 1)
    ]
    return pd.DataFrame(rows)


@given(st.lists(st.floats(-10, 10), min_size=3, max_size=6), st.floats(-5, 5))
def test_what_seeds_share_cancels_out_of_a_difference(hard: list[float], gain: float) -> None:
    shared = [50 + each for each in hard]
    gains = [gain + 0.1 * (i % 2) for i in range(len(hard))]
    otpo = [each + more for each, more in zip(shared, gains, strict=True)]
    mean, alone = (
        differences(table({"dpo": shared, "otpo": otpo}), "otpo", "dpo")["facts: win_rate"],
        mean_over_seeds(gains),
    )
    assert mean.n == len(hard)
    assert (mean.value, mean.low, mean.high) == pytest.approx((alone.value, alone.low, alone.high), abs=1e-9)


def test_a_difference_is_of_the_seeds_that_both_have() -> None:
    frame = table({"dpo": [50, 60, 70], "otpo": [51, 63]})
    found = differences(frame, "otpo", "dpo")["facts: win_rate"]
    assert (found.value, found.n) == (2.0, 2)
    assert differences(frame, "otpo", "simpo") == {}
    assert by_label(frame)["dpo", "facts: win_rate"].n == 3


def folder_of_run(folder: Path) -> Path:
    """What a run leaves: a board against the base, one between models, and a known truth."""
    board = pd.DataFrame(
        [
            {"name": "dpo", "task": "facts", "reference": "base", "win_rate": 54.0, "length_adjusted_winrate": 53.0}
            | {"avg_length": 80.0},
            {"name": "otpo", "task": "facts", "reference": "base", "win_rate": 55.0, "avg_length": 75.0},
            {"name": "otpo", "task": "facts", "reference": "dpo", "win_rate": 51.0, "avg_length": 75.0},
        ]
    )
    folder.mkdir()
    board.to_csv(folder / layout.LEADERBOARD, index=False)
    labels = ("base", "dpo", "otpo")
    accuracy = {label: {"trained": {"value": 0.5 + n / 10}} for n, label in enumerate(labels)}
    words = {label: {"trained": 10.0, "held_out": 11.0} for label in labels}
    deciding = [
        {"label": "uniform", "auc": 0.5},
        {"label": "otpo", "auc": 0.73},
        {"label": "otpo at reg 1", "auc": 0.5},
    ]
    truth = {"accuracy": accuracy, "words": words, "deciding_token": deciding}
    (folder / layout.KNOWN_TRUTH).write_text(json.dumps(truth))
    return folder


def test_figures_of_a_run_are_those_of_its_board_and_of_the_known_truth(tmp_path: Path) -> None:
    found = run_figures(folder_of_run(tmp_path / "run"), ["base", "dpo", "otpo"])
    values = {(label, figure): value for label, figure, value in found.itertuples(index=False)}
    assert values["dpo", "facts: win_rate"] == 54.0 and values["dpo", "facts: length_adjusted_winrate"] == 53.0
    assert values["otpo", "facts: win_rate"] == 55.0  # against the base, not against dpo
    assert ("otpo", "facts: length_adjusted_winrate") not in values
    assert values["otpo", "right, trained"] == pytest.approx(70.0) and values["base", "words, held_out"] == 11.0
    assert values["otpo", "weight AUC"] == 0.73 and ("dpo", "weight AUC") not in values
    assert len(found) == len(values), "a figure of a label is there once"


def test_the_page_has_the_tuned_values_the_means_and_the_differences(tmp_path: Path) -> None:
    figures = run_figures(folder_of_run(tmp_path / "run"), ["base", "dpo", "otpo"])
    seeds = [figures.assign(regime="plain", seed=seed, value=figures["value"] + seed) for seed in (0, 2)]
    tuned = {"plain": {"dpo": {"beta": 0.1, "learning_rate": 7e-5}, "otpo": {"reg": 0.25}}}
    text = study_text("study", pd.concat(seeds, ignore_index=True), tuned)
    lines = text.splitlines()
    assert lines[0] == "# study" and "| dpo | beta 0.1, learning_rate 7e-05 |" in lines
    half = 12.7062047 * np.sqrt(2) / np.sqrt(2)  # t of 1 degree of freedom; the two seeds lie 2 apart
    assert f"| facts: judged win rate, % |  | 55.0 ({55 - half:.1f} to {55 + half:.1f}) | 56.0" in text
    assert "| facts: judged win rate, % | +1.0 |" in lines  # both seeds agree
    assert "| AUC of the deciding token's weight |  |  | 1.73" in text
    assert "What otpo has more than each of the others" in text
