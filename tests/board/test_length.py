import gzip
import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.board.leaderboard import leaderboard
from eval.stats.length_control import (
    SLOPE_RIDGE,
    length_adjusted,
    length_controlled,
    load_calibration,
    why_not_official,
)
from eval.stats.verbosity import gain_from_length
from otpo.errors import UserError


def recorded(folder: Path, name: str) -> list[dict]:
    return json.loads(gzip.open(folder / "alpaca_eval" / name).read())


def columns(annotations: list[dict]) -> tuple[list[float], list[int], list[int]]:
    return (
        [a["preference"] for a in annotations],
        [len(a["output_1"]) for a in annotations],
        [len(a["output_2"]) for a in annotations],
    )


def rows_of(prefs: np.ndarray, annotations: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(annotations).assign(preference=prefs, index=range(len(annotations)))


def upstream(frame: pd.DataFrame, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """The installed reference code, its download replaced by the file on disk."""
    import sklearn
    from alpaca_eval.metrics import glm_winrate

    monkeypatch.setattr(glm_winrate, "hf_hub_download", lambda **_: folder / "alpaca_eval" / "df_gamed_surrogate.csv")
    with warnings.catch_warnings(), sklearn.config_context():
        warnings.simplefilter("ignore")
        return glm_winrate.get_length_controlled_winrate(frame, save_weights_dir=None)


@pytest.mark.parametrize("name", ["alpaca-7b", "claude-2.1", "gpt4_gamed"])
def test_length_controlled_is_that_of_alpaca_eval(shared_data, monkeypatch, name):
    annotations = recorded(shared_data, f"{name}/annotations.json.gz")
    calibration = load_calibration(shared_data / "alpaca_eval")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = length_controlled(*columns(annotations), calibration)
    expected = upstream(pd.DataFrame(annotations), shared_data, monkeypatch)
    assert ours["length_controlled_winrate"] == pytest.approx(expected["length_controlled_winrate"], abs=1e-3)
    assert ours["lc_standard_error"] == pytest.approx(expected["lc_standard_error"], abs=1e-4)
    board = pd.read_csv(shared_data / "alpaca_eval" / "leaderboard.csv", index_col=0)
    assert ours["length_controlled_winrate"] == pytest.approx(board.loc[name, "length_controlled_winrate"], abs=0.2)


def test_failed_verdicts_are_predicted_but_not_trained_on(shared_data, monkeypatch):
    annotations = recorded(shared_data, "claude-2.1/annotations.json.gz")
    preference, theirs, mine = columns(annotations)
    holes = np.array(preference)
    holes[::7] = np.nan
    ours = length_controlled(holes, theirs, mine, load_calibration(shared_data / "alpaca_eval"))
    expected = upstream(rows_of(holes, annotations), shared_data, monkeypatch)
    assert ours["length_controlled_winrate"] == pytest.approx(expected["length_controlled_winrate"], abs=1e-3)


def test_another_reference_or_subset_is_not_called_length_controlled(shared_data):
    reference = recorded(shared_data, "reference_gpt4_1106_preview.json.gz")
    assert why_not_official(reference) == ""
    assert "804" in why_not_official(reference[1:])
    assert "order" in why_not_official(reference[::-1])
    assert "alpaca-7b" in why_not_official(recorded(shared_data, "alpaca-7b/model_outputs.json.gz"))
    few = reference[:40]
    verdicts = pd.DataFrame(
        {
            "task": "alpaca_eval",
            "generator": "m",
            "reference": "r",
            "index": range(40),
            "instruction": [row["instruction"] for row in few],
            "preference": np.random.default_rng(0).uniform(1, 2, 40),
        }
    )
    outputs = [{**row, "output": row["output"][: 100 * (i % 9)]} for i, row in enumerate(few)]
    folder = shared_data / "alpaca_eval"
    for given_reference in (few, reference):
        board = leaderboard(verdicts, {"m": outputs}, given_reference, judge="j", protocol="p", calibration=folder)
        assert board["length_controlled_winrate"].isna().all() and board["length_adjusted_winrate"].notna().all()
        assert "not length-controlled" in board["note"][0]


def test_the_reference_against_itself_is_fifty(shared_data):
    reference = recorded(shared_data, "reference_gpt4_1106_preview.json.gz")
    verdicts = pd.DataFrame(
        {
            "task": "alpaca_eval",
            "generator": "gpt4_1106_preview",
            "reference": "gpt4_1106_preview",
            "index": range(805),
            "instruction": [row["instruction"] for row in reference],
            "preference": 1.5,
        }
    )
    folder = shared_data / "alpaca_eval"
    board = leaderboard(
        verdicts, {"gpt4_1106_preview": reference}, reference, judge="j", protocol="p", calibration=folder
    )
    row = board.iloc[0]
    assert (row["win_rate"], row["length_controlled_winrate"], row["lc_standard_error"]) == (50, 50, 0)
    # a model that is only called like the reference
    verdicts["preference"] = np.random.default_rng(0).uniform(1, 1.4, 805)
    other = {"gpt4_1106_preview": [{**row, "output": row["output"][::2]} for row in reference]}
    row = leaderboard(verdicts, other, reference, judge="j", protocol="p", calibration=folder).iloc[0]
    assert row["win_rate"] < 30 and row["length_controlled_winrate"] < 40


def test_calibration_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_calibration(tmp_path / "nowhere")
    (tmp_path / "instruction_difficulty.csv").write_text("index,instruction_difficulty\n0,0.0\n")
    with pytest.raises(UserError, match="one df_gamed"):
        load_calibration(tmp_path)
    (tmp_path / "df_gamed.csv").write_text("preference,index\n0.5,0\n")
    with pytest.raises(UserError, match="std_delta_len"):
        load_calibration(tmp_path)


def world(slope: float, level: float, n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Verdicts drawn from the model itself: a judge who likes length, and a model whose outputs are long."""
    rng = np.random.default_rng(seed)
    theirs, mine = rng.integers(50, 150, n), rng.integers(80, 240, n)
    delta = (theirs - mine) / (theirs - mine).std(ddof=1)
    chance = 1 / (1 + np.exp(-(slope * np.tanh(delta) + level)))
    return 1 + (rng.uniform(size=n) < chance), theirs, mine


def test_length_adjusted_recovers_the_quality_under_a_length_bias():
    truth = 100 / (1 + np.exp(0.4))
    results = [length_adjusted(*world(-2.0, -0.4, 400, seed), seed=seed) for seed in range(40)]
    raw = np.mean([(world(-2.0, -0.4, 400, seed)[0] - 1).mean() * 100 for seed in range(40)])
    assert np.mean([r[0] for r in results]) == pytest.approx(truth, abs=2)
    assert raw > truth + 10
    assert np.mean([r[1].low <= truth <= r[1].high for r in results]) >= 0.85


def test_length_adjusted_is_the_penalised_maximum_likelihood():
    from scipy.optimize import minimize

    preference, theirs, mine = world(-1.0, 0.3, 60, 3)
    delta = theirs - mine
    x, y = np.tanh(delta / delta.std(ddof=1)), preference - 1

    def loss(theta):
        logit = theta[0] * x + theta[1]
        return np.sum(np.logaddexp(0, logit) - y * logit) + 0.5 * SLOPE_RIDGE * theta[0] ** 2

    level = minimize(loss, [0.0, 0.0], tol=1e-12).x[1]
    assert length_adjusted(preference, theirs, mine)[0] == pytest.approx(100 / (1 + np.exp(-level)), abs=1e-3)


@given(st.integers(0, 10_000), st.integers(2, 60))
@settings(max_examples=25, deadline=None)
def test_length_adjusted_of_the_swapped_sides_is_mirrored(seed, n):
    rng = np.random.default_rng(seed)
    preference, theirs, mine = 1 + rng.beta(0.3, 0.3, n), rng.integers(0, 99, n), rng.integers(0, 99, n)
    there, back = length_adjusted(preference, theirs, mine)[0], length_adjusted(3 - preference, mine, theirs)[0]
    assert there == pytest.approx(100 - back, abs=1e-6)


def test_length_adjusted_at_equal_lengths_is_the_win_rate():
    preference = [1.9, 1.1, 1.3, 1.8, 1.5]
    estimate, interval = length_adjusted(preference, [10] * 5, [10] * 5)
    assert estimate == pytest.approx(52, abs=1e-3)
    assert interval.low < 52 < interval.high


@pytest.mark.parametrize("preference", [[2.0] * 6, [1.0] * 6, [2, 2, 2, 1, 1, 1]])
def test_length_adjusted_stays_finite_where_length_or_nothing_decides(preference):
    estimate, _ = length_adjusted(preference, [10] * 6, [20, 20, 20, 5, 5, 5])
    assert 0 <= estimate <= 100


def test_where_lengths_hardly_overlap_the_interval_and_the_note_say_that_it_extrapolates():
    rng = np.random.default_rng(0)
    theirs, mine = rng.integers(90, 110, 200), rng.integers(112, 300, 200)
    mine[:2] = 60
    delta = (theirs - mine) / (theirs - mine).std(ddof=1)
    chance = 1 / (1 + np.exp(3 * np.tanh(delta) + 1.0))
    preference = 1 + (rng.uniform(size=200) < chance)
    estimate, interval = length_adjusted(preference, theirs, mine)
    assert "extrapolates, and its ridge alone moves it by" in interval.note
    moved = float(interval.note.split("moves it by ")[1].split()[0])
    assert moved > 0.5 and interval.low <= estimate <= interval.high
    assert interval.high - interval.low > 10 * moved or interval.high - interval.low > 30
    overlapping = length_adjusted(*world(-2.0, -0.4, 400, 0))[1]
    assert overlapping.note == "" and interval.high - interval.low > 1.5 * (overlapping.high - overlapping.low)


def test_what_length_has_of_a_lead_is_all_where_length_decides_and_nothing_where_it_does_not():
    rng = np.random.default_rng(0)
    n = 600
    mine, theirs = rng.integers(50, 400, n), rng.integers(50, 300, n)

    def row(preference: np.ndarray) -> pd.Series:
        outputs, reference = ([{"instruction": str(i), "output": "x" * k} for i, k in enumerate(lengths)]
                              for lengths in (mine, theirs))  # fmt: skip
        frame = pd.DataFrame({"task": "t", "generator": "m", "reference": "r", "index": range(n),
                              "instruction": [str(i) for i in range(n)], "preference": preference})  # fmt: skip
        return leaderboard(frame, {"m": outputs}, reference, judge="j", protocol="p").iloc[0]

    by_length = row(1.0 + (rng.random(n) < 1 / (1 + np.exp((theirs - mine) / 60))))
    by_chance = row(1.0 + (rng.random(n) < 0.7))
    assert by_length["win_rate"] > 55 and by_length["gain_from_length"] == pytest.approx(100, abs=30)
    assert by_chance["win_rate"] > 60 and by_chance["gain_from_length"] == pytest.approx(0, abs=15)
    assert pd.isna(row(1.0 + np.arange(n) % 2)["gain_from_length"])
    assert gain_from_length(60.0, 55.0, (56.0, 64.0)) == pytest.approx(50.0)
    assert gain_from_length(40.0, 45.0, (36.0, 44.0)) == pytest.approx(50.0)
    assert gain_from_length(60.0, 65.0, (56.0, 64.0)) == pytest.approx(-50.0)
    assert gain_from_length(60.0, 55.0, (49.0, 71.0)) is gain_from_length(None, 55.0, (1.0, 2.0)) is None
