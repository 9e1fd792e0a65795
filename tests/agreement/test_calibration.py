"""Whether a judge is as often right as it is sure: closed forms, scikit-learn, and judges of known temperature."""

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from eval.stats.calibration import calibration

NAN = float("nan")


def simulated(n: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, list[tuple[int]], list[str]]:
    """People draw labels by true odds; the judge says these odds times the temperature."""
    generator = np.random.default_rng(seed)
    odds = generator.normal(0, 1.5, n)
    labels = 1 + (generator.random(n) < expit(odds))
    said = 1 + expit(odds * temperature)
    return said, said, [(int(label),) for label in labels], [str(i) for i in range(n)]


def test_four_verdicts_by_hand():
    found = calibration([1.9, 1.2, 1.5, NAN], [1.9, 1.2, 1.5, 1.7], [(2,), (2,), (1,), (0,)], list("abcd"))
    assert found["confidence"] == pytest.approx((0.9 + 0.8 + 0.5) / 3)
    assert found["right"] == pytest.approx((1 + 0 + 0.5) / 3)
    assert found["brier"] == pytest.approx((0.01 + 0.64 + 0.25) / 3)
    assert found["calibration_error"] == pytest.approx((0.1 + 0.8 + 0.0) / 3)
    assert [(each["n"], each["right"]) for each in found["bins"]] == [(2, 0.5), (2, 0.0), (2, 1.0)]
    assert found["right_low"] < found["right"] < found["right_high"]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_of_a_judge_is_found(temperature):
    said, again, labels, names = simulated(20_000, temperature)
    found = calibration(said, again, labels, names)
    better = np.array([label for (label,) in labels]) - 1
    odds = (np.log(said - 1) - np.log(2 - said)).reshape(-1, 1)
    slope = LogisticRegression(fit_intercept=False, C=1e9).fit(odds, better).coef_[0, 0]
    assert found["temperature"] == pytest.approx(1 / slope, rel=1e-3)
    assert found["temperature"] == pytest.approx(temperature, rel=0.05)
    assert found["brier"] == pytest.approx(brier_score_loss(better, said - 1))
    calibrated = found["confidence"] - found["right"]
    assert abs(calibrated) < 0.01 if temperature == 1 else (calibrated > 0.03) == (temperature > 1)
    assert (found["calibration_error"] < 0.02) == (temperature == 1)


def test_whole_verdicts_have_no_temperature_and_nobody_is_asked_about_nothing():
    whole = calibration([2.0, 1.0, 2.0], [2.0, 1.0, 2.0], [(2,), (1,), (1,)], list("abc"))
    assert (whole["confidence"], whole["right"], whole["temperature"]) == (1.0, pytest.approx(2 / 3), None)
    assert whole["calibration_error"] == pytest.approx(1 / 3)
    nothing = calibration([NAN], [NAN], [(1,)], ["a"])
    assert (nothing["brier"], nothing["calibration_error"], nothing["bins"]) == (None, None, [])
    faultless = calibration([1.9, 1.1, 1.7], [1.9, 1.1, 1.7], [(2,), (1,), (2,)], list("abc"))
    assert faultless["temperature"] is None  # the surer the better: no finite one fits best


@pytest.mark.parametrize("sure", [0.6, 0.9, 0.99, 0.999, 0.9999, 0.9999999])
def test_no_finite_temperature_fits_a_judge_who_is_always_right_or_always_wrong(sure):
    said = [1 + sure, 2 - sure, 1.7]
    for labels in ([(2,), (1,), (2,)], [(1,), (2,), (1,)]):
        assert calibration(said, said, labels, list("abc"))["temperature"] is None


@pytest.mark.parametrize("unsure", [1e-15, 1e-12, 1e-6])
def test_no_temperature_is_made_of_rounding_errors(unsure):
    """All verdicts are nearly ties and mostly right: the odds would have to grow without end."""
    said = 1.5 + unsure * np.array([1, 1, -1, 1])
    assert calibration(said, said, [(2,), (2,), (1,), (1,)], list("abcd"))["temperature"] is None
