"""HelpSteer2: ratings that become pairs, and preferences, as its files hold them."""

from itertools import groupby

import pytest
from conftest import SENTENCES
from hypothesis import given
from hypothesis import strategies as st
from support.published_rows import PREFERRED, STEER, STEER_PROMPT, STEER_TURNS, assistant, parts, rated, same

from otpo.data.convert import convert
from otpo.data.tokens import tokenize_pairs
from otpo.errors import UserError
from otpo.models.fresh import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(SENTENCES, vocab_size=600)


def test_helpsteer_ratings_become_pairs_by_helpfulness():
    examples, report = convert(STEER)
    assert [(e.row, e.prompt, *e.completions) for e in examples] == [
        (0, STEER_PROMPT, "Anna and Eva sold the old bicycle.", "They sold a bicycle."),
        (2, "c#", "C# is a language.", "C# is a note."),
    ]
    assert (report.n_rows, report.n_groups, report.n_usable) == (4, 2, 2)
    assert "rows      4, 2 pairs of rows, usable 2 (numbered from 0, a pair by its first row)" in report.lines()


def test_helpsteer_rows_that_make_no_pair_are_counted_by_reason():
    rows = [
        rated("a", "one", 2), rated("b", "alone", 4), rated("a", "two", 2), rated("c", "x", None), rated("c", "y", 1),
        rated("d", "same", 1), rated("d", "same", 2), *STEER[2:],
    ]  # fmt: skip
    examples, report = convert(rows)
    assert [example.row for example in examples] == [7]
    assert report.problems == {
        "equal helpfulness": [0],
        "no second response to the prompt": [1],
        "no helpfulness": [3],
        "identical completions": [5],
    }
    assert (report.n_rows, report.n_groups) == (9, 5)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 4)), min_size=1, max_size=24))
def test_each_helpsteer_row_is_in_one_pair_wherever_its_partner_stands(drawn):
    rows = [rated(prompt, f"response {number}", score) for number, (prompt, score) in enumerate(drawn)]
    expected = []
    by_prompt = sorted(enumerate(drawn), key=lambda item: item[1][0])  # stable: keeps the order of the rows
    for prompt, group in groupby(by_prompt, key=lambda item: item[1][0]):
        numbers = [number for number, _ in group]
        for first, second in zip(numbers[::2], numbers[1::2], strict=False):
            best, worst = sorted((first, second), key=lambda number: -drawn[number][1])
            if drawn[best][1] > drawn[worst][1]:
                expected.append((first, prompt, f"response {best}", f"response {worst}"))
    try:
        examples, report = convert(rows)
    except UserError:
        assert not expected
        return
    assert [(e.row, e.prompt, *e.completions) for e in examples] == sorted(expected)
    assert sum(map(len, report.problems.values())) + report.n_usable == report.n_groups


@pytest.mark.parametrize("rows", [STEER[:2], [PREFERRED]])
def test_helpsteer_turns_become_messages_with_the_chat_template(tokenizer, rows):
    answers = ["Anna and Eva sold the old bicycle.", "They sold a bicycle."]
    assert parts(PREFERRED) == (STEER_PROMPT, *answers)
    messages = {"prompt": STEER_TURNS, "chosen": [assistant(answers[0])], "rejected": [assistant(answers[1])]}
    same(rows, [messages], tokenizer)
    (pair,), report = tokenize_pairs(rows, tokenizer)
    assert report.template == "literal"
    assert tokenizer.decode(pair.prompt_ids) == "<|bos|>" + STEER_PROMPT


@pytest.mark.parametrize(
    ("strength", "chosen"),
    [(-3, "response_1"), (-1, "response_1"), (1, "response_2"), (3, "response_2"), ("2", "response_2")],
)
def test_helpsteer_preference_chooses_by_the_sign(strength, chosen):
    assert parts({**PREFERRED, "preference_strength": strength})[1] == PREFERRED[chosen]


def test_helpsteer_preferences_that_prefer_nothing_are_counted():
    rows = [{**PREFERRED, "preference_strength": strength} for strength in (1, 0, None, "much", 0.0)]
    _, report = convert(rows)
    assert report.problems == {
        "preference_strength is 0: neither response is preferred": [1, 4],
        "no preference_strength": [2],
        "preference_strength is not a number": [3],
    }
