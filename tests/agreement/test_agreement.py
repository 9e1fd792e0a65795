"""The figures of a judge beside people: closed forms, published numbers, and intervals that hold what they say."""

import json
import warnings
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import cohen_kappa_score

from eval.stats.agreement import (
    UNDECIDED,
    agreement,
    cohen_kappa,
    grouped_kappa,
    grouped_mean,
    longer_is_right,
    majority,
)
from eval.stats.intervals import NEAR, mean_intervals
from otpo.files import read_rows

NAN = float("nan")
# How many of PandaLM's 999 pairs have these three labels.
PANDALM = {
    (2, 2, 2): 426, (1, 1, 1): 368, (0, 0, 0): 85, (1, 2, 2): 36, (1, 1, 2): 33, (0, 1, 1): 21, (0, 0, 2): 13,
    (0, 2, 2): 10, (0, 0, 1): 7,
}  # fmt: skip


def test_llmbar_natural_as_published(shared_data):
    """The recorded verdicts of GPT-4 give the statistics that LLMBar published of them."""
    rows = read_rows(shared_data / "llmbar" / "Natural" / "gpt4_vanilla_result.json")
    first, second = (
        [float(row["results"][0][f"swap = {swapped}"]["winner"]) for row in rows] for swapped in (False, True)
    )
    found = agreement(first, second, [(row["label"],) for row in rows], [row["input"] for row in rows])
    published = json.loads((shared_data / "llmbar" / "Natural" / "gpt4_vanilla_statistics.json").read_text())
    for name, theirs in {
        "accuracy_first_order": "correct_False",
        "accuracy_second_order": "correct_True",
        "accuracy": "correct_average",
        "both_correct": "correct_both",
        "consistency": "equal",
    }.items():
        assert 100 * found[name] == pytest.approx(float(published[theirs].split("=")[-1].rstrip("%")), abs=1e-9), name
    assert found["kappa_orders"] == pytest.approx(published["kappa_agreement"], abs=1e-12)
    assert (found["n"], found["n_failed"], found["ties"]) == (100, 0, 0)


def test_people_agree_on_pandalm_as_published():
    labels = [each for each, times in PANDALM.items() for _ in range(times)]
    found = agreement([1.2] * 999, [1.2] * 999, labels, list(map(str, range(999))))
    assert round(found["human_agreement"], 4) == 0.9199
    assert found["human_agreement_low"] < 0.9199 < found["human_agreement_high"]
    assert (found["pairs"], found["ties"], found["undecided"], found["n"]) == (999, 105, 0, 894)
    assert found["accuracy"] == pytest.approx((368 + 33 + 21) / 894)
    # where all three name a winner, and where two of three do
    of_three, of_two = 426 + 368 + (36 + 33) / 3, 21 + 10
    pairs = 426 + 368 + 36 + 33 + 21 + 10
    assert found["human_agreement_on_winners"] == pytest.approx((of_three + of_two) / pairs)
    judged = 368 + 36 / 3 + 33 * 2 / 3 + 21
    assert found["judge_agreement_on_winners"] == pytest.approx(judged / pairs)


def test_what_counts_and_what_does_not():
    cases = [  # first order, second order, labels
        (1.1, 1.2, (1,)),  # right twice
        (1.1, 1.9, (2,)),  # right in the second order
        (1.5, 1.9, (2, 2, 1)),  # half and right
        (1.5, 1.5, (1,)),  # half twice, and consistent
        (1.9, 1.9, (0,)),  # people call it a tie
        (1.9, 1.9, (1, 2)),  # nobody is in the majority
        (NAN, 1.9, (2,)),  # one order failed
        (NAN, NAN, (0, 0)),  # not asked
    ]
    first, second, labels = zip(*cases, strict=True)
    found = agreement(first, second, labels, list("abcdefgh"))
    counts = {"pairs": 8, "ties": 2, "undecided": 1, "n_failed": 1, "n": 4, "judge_ties": 3}
    assert {name: found[name] for name in counts} == counts
    assert found["accuracy_first_order"] == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)
    assert found["accuracy_second_order"] == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert found["accuracy"] == pytest.approx((1 + 0.5 + 0.75 + 0.5) / 4)
    assert found["both_correct"] == pytest.approx(1 / 4)
    assert found["consistency"] == pytest.approx(2 / 4)
    assert found["accuracy_if_missing_wrong"] == pytest.approx(2.75 / 5)
    assert found["accuracy_if_missing_right"] == pytest.approx(3.75 / 5)
    winners = [["1", "1", "tie", "tie"], ["1", "2", "2", "tie"]]
    assert found["kappa_orders"] == pytest.approx(cohen_kappa_score(*winners))


def test_without_pairs_to_count_there_is_no_figure():
    found = agreement([NAN, 1.2], [1.2, 1.2], [(1,), (0,)], ["a", "b"])
    assert found["n"] == 0 and found["accuracy"] is None and found["kappa_orders_low"] is None
    assert found["accuracy_if_missing_right"] == 1 and "human_agreement" not in found
    same = agreement([1.2] * 3, [1.2] * 3, [(1,)] * 3, list("abc"))
    assert same["consistency"] == 1 and same["kappa_orders"] is None  # chance alone would agree as often


@pytest.mark.parametrize(
    ("labels", "said"), [((1, 1, 2), 1), ((2,), 2), ((0, 0, 1), 0), ((1, 2), UNDECIDED), ((0, 1, 2), UNDECIDED)]
)
def test_the_majority(labels, said):
    assert {majority(each) for each in (labels, labels[::-1])} == {said}


@given(st.lists(st.tuples(st.sampled_from("ABC"), st.sampled_from("ABC")), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_kappa_is_scikit_learns(answers):
    table = np.array([[answers.count((one, other)) for other in "ABC"] for one in "ABC"], dtype=float)
    with warnings.catch_warnings(action="ignore", category=UndefinedMetricWarning):
        expected = cohen_kappa_score(*zip(*answers, strict=True), labels=list("ABC"))
    assert cohen_kappa(table) == pytest.approx(expected, nan_ok=True)


def test_the_longer_output():
    assert longer_is_right([9, 1, 5, 9], [1, 9, 5, 1], [(1,), (1,), (2,), (0,)]) == pytest.approx(1.5 / 3)
    assert longer_is_right([9], [1], [(0,)]) is None


# ---- intervals ----


def test_instructions_that_all_differ_have_the_interval_of_a_board():
    rng = np.random.default_rng(1)
    first, second = 1 + (rng.random((2, 60)) < 0.2)
    found = agreement(first, second, [(1,)] * 60, list(map(str, range(60))))
    low, high = mean_intervals(2 - first, (0.0, 1.0), NEAR)
    ends = (found["accuracy_first_order_low"], found["accuracy_first_order_high"])
    assert ends == pytest.approx((low[0], high[0]))


def test_each_interval_holds_its_figure_even_where_all_are_right():
    found = agreement([1.0, 2.0] * 20, [1.0, 2.0] * 20, [(1, 1), (2, 2)] * 20, list(map(str, range(40))))
    shares = [name.removesuffix("_low") for name in found if name.endswith("_low")]
    assert len(shares) == 9
    for name in shares:
        assert found[name] == found[f"{name}_high"] == 1 and 0.85 < found[f"{name}_low"] < 0.96, name


def test_pairs_of_one_instruction_are_not_independent():
    """Of simulated sets of pairs, 95 % of the intervals hold the truth; counted pair by pair, far fewer do.

    Instructions are easy or hard and have one to eleven pairs; 75 % of all pairs are right.
    """
    rng, sets, instructions = np.random.default_rng(0), 200, 60
    held = 0
    alone = np.full((sets, 11 * instructions), np.nan)
    for row in alone:
        sizes = rng.integers(1, 12, instructions)
        right = rng.random(sizes.sum()) < np.repeat(rng.beta(1.5, 0.5, instructions), sizes)
        row[: len(right)] = right
        found = grouped_mean("right", right, np.repeat(np.arange(instructions), sizes))
        held += found["right_low"] <= 0.75 <= found["right_high"]
    low, high = mean_intervals(alone, (0.0, 1.0), NEAR)
    assert abs(held / sets - 0.95) < 3 * np.sqrt(0.05 * 0.95 / sets)
    assert ((low <= 0.75) & (high >= 0.75)).mean() < 0.85


def test_an_instruction_counts_by_its_pairs():
    """Many pairs of easy instructions and few of hard ones: the interval lies about the pairs' mean."""
    right = np.array(([1] * 9 + [0]) * 20)
    found = grouped_mean("right", right, np.repeat(np.arange(40), [9, 1] * 20))
    assert found["right"] == pytest.approx(0.9)
    assert 0.8 < found["right_low"] < 0.9 < found["right_high"] < 0.96


@pytest.mark.parametrize(("right", "n"), [(0.95, 60), (0.7, 60), (0.97, 300)])
def test_intervals_of_kappa_hold_the_truth(right, n):
    """Two orders that err by themselves; kappa's truth is that of their table."""
    table = np.zeros((2, 2))
    for better, one, other in product((0, 1), (0, 1), (0, 1)):
        table[one, other] += 0.5 * np.prod([right if each == better else 1 - right for each in (one, other)])
    truth, rng, sets = float(cohen_kappa(table)), np.random.default_rng(0), 300
    held = 0
    for _ in range(sets):
        one, other = np.divmod(rng.choice(4, n, p=table.ravel()), 2)
        found = grouped_kappa("kappa", np.stack([1.0 + one, 1.0 + other]), np.arange(n))
        held += found["kappa_low"] <= truth <= found["kappa_high"]
    assert abs(held / sets - 0.95) < 3.5 * np.sqrt(0.05 * 0.95 / sets)


def test_kappa_knows_of_instructions_too():
    """Six pairs of an instruction that always go the same way say no more than one."""
    one, other = [1, 2, 1, 2, 1, 2, 1, 2, 1, 2], [1, 2, 1, 2, 1, 2, 1, 2, 2, 1]
    names = list("abcdefghij")
    alone = agreement(one, other, [(1,)] * 10, names)
    sixfold = agreement(np.repeat(one, 6), np.repeat(other, 6), [(1,)] * 60, np.repeat(names, 6).tolist())
    for end in ("", "_low", "_high"):
        assert sixfold[f"kappa_orders{end}"] == pytest.approx(alone[f"kappa_orders{end}"])
        assert sixfold[f"consistency{end}"] == pytest.approx(alone[f"consistency{end}"])


def test_two_people_are_every_two():
    labels = [(1, 1, 2, 0), (2, 2)]
    found = agreement([1.2, 1.2], [1.2, 1.2], labels, ["a", "b"])
    same = [np.mean([one == other for one, other in combinations(each, 2)]) for each in labels]
    assert found["human_agreement"] == pytest.approx(np.mean(same))
