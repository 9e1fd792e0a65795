"""Style-controlled scores: scikit-learn as the oracle of the fit, and simulated boards whose truth is known."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from eval.stats import style_control
from eval.stats.style_control import Games, style_controlled, style_differences, style_of


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def boards(rng, truth, slope, n=300, spread=1.0):
    """Two games a prompt of each model, which share its difficulty, before a judge who likes what is longer."""
    hard = rng.normal(0, spread, n)
    games = {}
    for name, (level, longer) in truth.items():
        style = np.zeros((n, 4))
        style[:, 0] = np.tanh(rng.normal(longer, 0.5, n))
        style[:, 2] = np.tanh(rng.normal(0, 0.5, n))
        p = sigmoid(level + slope * style[:, 0] + hard)
        won = np.concatenate([rng.random(n) < p, rng.random(n) < p]).astype(float)
        games[name] = Games(won, rng.choice([1.0, 3.0], 2 * n), np.vstack([style, style]), np.tile(np.arange(n), 2))
    return games


def test_without_its_penalties_the_fit_is_logistic_regression(monkeypatch):
    monkeypatch.setattr(style_control, "SLOPE_RIDGE", 1e-9)
    monkeypatch.setattr(style_control, "HALF_GAME", 0.0)
    games = boards(np.random.default_rng(1), {"a": (0.3, 0.5), "b": (-0.5, -0.2)}, 1.0)
    rows = [np.hstack([np.tile(np.eye(2)[i], (600, 1)), own.style]) for i, own in enumerate(games.values())]
    x = np.vstack(rows)[:, [0, 1, 2, 4]]
    won, weight = (np.concatenate([getattr(own, part) for own in games.values()]) for part in ("won", "weight"))
    oracle = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000).fit(x, won, weight)
    found = style_controlled(games)
    for i, name in enumerate(games):
        assert found[name][0] == pytest.approx(100 * sigmoid(oracle.coef_[0, i]), abs=1e-4)


def test_a_model_that_wins_by_length_alone_is_even_at_equal_style():
    games = boards(np.random.default_rng(2), {"long": (0.0, 0.8), "short": (0.0, -0.8)}, 3.0, n=2000, spread=0.0)
    raw = {name: np.average(own.won, weights=own.weight) for name, own in games.items()}
    assert raw["long"] > 0.75 and raw["short"] < 0.25
    for level, ends in style_controlled(games).values():
        assert ends.low < 50 < ends.high and level == pytest.approx(50, abs=4)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng, held, n = np.random.default_rng(3), [], 400
    truth = {"a": (0.4, 0.4), "b": (-1.0, -0.2)}
    # What is estimated where prompts differ: the fit to very many of them.
    whole = style_controlled(boards(rng, truth, 1.5, n=100_000))
    for _ in range(n):
        for name, (_, ends) in style_controlled(boards(rng, truth, 1.5)).items():
            held.append(ends.low <= whole[name][0] <= ends.high)
    assert 0.93 < np.mean(held) < 0.97  # the standard error is 0.008


def test_games_that_are_all_won_have_an_interval():
    games = Games(np.ones(40), np.ones(40), np.zeros((40, 4)), np.repeat(np.arange(20), 2))
    level, ends = style_controlled({"best": games})["best"]
    assert 95 < level < 100 and ends.low < level < ends.high <= 100
    nothing = Games(np.full(4, np.nan), np.ones(4), np.zeros((4, 4)), np.arange(4))
    found = style_controlled({"best": games, "none": nothing})
    assert found["none"][0] is None and found["best"][0] == pytest.approx(level)


@pytest.mark.parametrize("n", [3, 10, 99, 805])
@pytest.mark.parametrize("difference", [0.5, 0.1, 0.2, 1 / 3, 0.7])
def test_a_style_that_all_games_have_alike_says_nothing(n, difference):
    won = (np.arange(n) % 4 > 0).astype(float)

    def of(value):
        return style_controlled({"m": Games(won, np.ones(n), np.zeros((n, 4)) + value, np.arange(n))})["m"]

    level, ends = of(difference + 1e-8 * np.random.default_rng(n).normal(size=(n, 4)))
    assert level == pytest.approx(of(0.0)[0]) and ends.low == pytest.approx(of(0.0)[1].low)
    level, ends = of(difference)
    assert level == pytest.approx(of(0.0)[0]) and ends.low == pytest.approx(of(0.0)[1].low)


def test_style_is_words_and_markdown_outside_of_code():
    text = (
        "# Title\n\nSome **bold** words.\n\n- one\n- two\n1. three\n\n```python\n# no header\n- no item **no**\n```\n"
    )
    words = len(text.split())
    assert style_of(text).tolist() == [words, 1 / (words + 1), 3 / (words + 1), 1 / (words + 1)]
    assert style_of("").tolist() == [0, 0, 0, 0]
    same = style_differences(["a b", "x"], ["a b", "x y z"])
    assert same[0].tolist() == [0, 0, 0, 0] and same[1, 0] == pytest.approx(-0.5)
