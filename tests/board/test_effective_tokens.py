"""How many tokens carry the weight, and what is said where weights are nearly uniform."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.html_page import assert_sound
from test_report import make_run

from eval.board import report
from eval.board.effective_tokens import (
    MASS,
    NEARLY_UNIFORM,
    effective_shares,
    pair_sentence,
    pairs_sentence,
    run_sentence,
)
from pipeline.run.metrics import nearly_uniform

positive = st.lists(st.floats(0.01, 10), min_size=1, max_size=40)


def weighed(chosen, rejected, **changes) -> dict:
    """A row of weights.json with the figures that training logs, by their definitions."""
    metrics = {MASS: 0.8}
    for side, weights in (("chosen", np.array(chosen)), ("rejected", np.array(rejected))):
        share = weights / weights.sum()
        metrics[f"weights/effective_tokens_{side}"] = float(weights.sum() ** 2 / (weights**2).sum())
        metrics[f"weights/entropy_{side}"] = float(-(share * np.log(share)).sum() / np.log(max(2, len(weights))))
    tokens = {f"{side}_tokens": ["a"] * len(w) for side, w in (("chosen", chosen), ("rejected", rejected))}
    row = {"label": "otpo", "prompt": "p", "chosen_weights": chosen, "rejected_weights": rejected, "metrics": metrics}
    return row | tokens | changes


@given(positive, positive)
def test_the_share_of_effective_tokens_is_one_over_one_plus_the_squared_variation(chosen, rejected):
    shares = effective_shares(weighed(chosen, rejected))
    for share, weights in zip(shares, (chosen, rejected), strict=True):
        assert share == pytest.approx(1 / (1 + (np.std(weights) / np.mean(weights)) ** 2))
    row = weighed(chosen, rejected)
    assert (pair_sentence(row, "otpo") is not None) == (min(shares) > NEARLY_UNIFORM)


def spread(n: int, share: float) -> list[float]:
    """n (even) weights whose effective tokens are that share of n."""
    v = math.sqrt(1 / share - 1)
    return [1 - v, 1 + v] * (n // 2)


@pytest.mark.parametrize("n", [2, 10, 400])
def test_the_line_is_the_same_for_short_and_long_completions(n):
    above, below = spread(n, NEARLY_UNIFORM + 0.001), spread(n, NEARLY_UNIFORM - 0.001)
    assert pair_sentence(weighed(above, above), "otpo") is not None
    assert pair_sentence(weighed(above, below), "otpo") is None
    assert pair_sentence(weighed(below, above), "otpo") is None


def test_only_transport_is_said_to_be_even_and_pairs_are_counted():
    even, sharp = weighed([0.5] * 4, [1.0] * 2), weighed([0.1, 1.9], [1.0] * 2)
    mean = weighed([0.25] * 4, [0.5] * 2)
    del mean["metrics"][MASS]
    assert "every chosen token a weight of about 0.5 and every rejected one about 1 " in pair_sentence(even, "otpo")
    assert pair_sentence(mean, "simpo") is None
    assert "in 2 of 3 pairs" in pairs_sentence([even, sharp, even, mean])
    assert pairs_sentence([sharp, mean]) is None


def steps(*lines: tuple[float, float, float, float]) -> list[dict]:
    """Lines of metrics.jsonl: effective tokens and lengths of both completions."""
    names = [f"{name}{side}" for name in ("weights/effective_tokens_", "lengths/") for side in ("chosen", "rejected")]
    return [{"step": i, "loss": 0.7, MASS: 0.9, **dict(zip(names, line, strict=True))} for i, line in enumerate(lines)]


def test_a_run_is_even_over_all_its_tokens():
    even = steps((19.9, 9.9, 20, 10), (39.8, 9.9, 40, 10))
    assert "99.5% of the chosen, 99.0% of the rejected" in run_sentence("otpo", pd.DataFrame(even))
    # one short step with sharp weights does not make the run sharp, a long one does; an evaluation counts for nothing
    evaluation = {"step": 2, "eval_loss": 0.7} | {f"eval_{name}": value for name, value in even[0].items()}
    assert run_sentence("otpo", pd.DataFrame([*even, *steps((0.9, 0.9, 1, 1)), evaluation])) is not None
    assert run_sentence("otpo", pd.DataFrame([*even, *steps((50, 9.9, 60, 10))])) is None
    assert run_sentence("otpo", pd.DataFrame([*even, *steps((40, 5, 40, 10))])) is None
    others = pd.DataFrame(even).drop(columns=MASS)
    assert run_sentence("dpo", others) is None and run_sentence("base", pd.DataFrame()) is None


def test_a_run_with_even_weights_says_so_on_its_page_and_at_the_end_of_training(tmp_path):
    logged = {"blunt": steps((19.9, 9.9, 20, 10)), "sharp": steps((12.0, 9.0, 20, 10))}
    run = make_run(tmp_path / "run", {"blunt": 0.8, "sharp": 0.6})
    files = {label: run / "models" / label / "metrics.jsonl" for label in logged}
    for label, lines in logged.items():
        files[label].write_text("".join(json.dumps(line) + "\n" for line in lines))
    (note,) = nearly_uniform(files)
    assert note.startswith("blunt: the token weights were nearly uniform over the run")
    words = assert_sound(report.build([run], run)).words()
    assert note in words and "sharp: the token weights" not in words and "Token weights" in words
    files["blunt"].write_text(json.dumps(logged["sharp"][0]))
    assert "Token weights" not in assert_sound(report.build([run], run)).words()
