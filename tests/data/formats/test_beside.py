"""Columns that say something beside those that are read: in any row, in any spelling, none is dropped unnoticed."""

import pytest
from support.chat_templates import CHATML_TOOLS, assert_rendered, tokenizer_with
from support.published_rows import assistant, user

from otpo.data.convert import convert
from otpo.data.tokens import tokenize_pairs
from otpo.errors import UserError

ASK = "Where does the train leave?"
ROW = {"prompt": ASK, "chosen": "From the third.", "rejected": "No idea."}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "board", "parameters": {}}}


def refused(rows, **settings):
    with pytest.raises(UserError) as error:
        convert(rows, "pairs.json", **settings)
    return str(error.value)


def every_other(column, cell, rows=2000):
    """Rows whose odd numbers have the cell, which a sample of every second row does not see."""
    return [{**ROW, column: cell if number % 2 else None} for number in range(rows)]


# ---- filled in a few rows alone ----


def test_a_system_prompt_of_odd_rows_is_read_in_these():
    tokenizer = tokenizer_with(CHATML_TOOLS)
    pairs, report = tokenize_pairs(every_other("system", "Be brief."), tokenizer)
    assert "with system" in report.why and len(pairs) == 2000
    for pair, before in zip(pairs[:2], ([], [SYSTEM]), strict=True):
        assert_rendered(tokenizer, pair, [*before, user(ASK)], assistant(ROW["chosen"]), assistant(ROW["rejected"]))


def test_tools_and_earlier_turns_of_odd_rows_are_read_in_these():
    examples, _ = convert(every_other("tools", [TOOL]))
    assert [example.tools for example in examples[:2]] == [None, [TOOL]]
    examples, _ = convert(every_other("history", [["Hi", "Hello"]]))
    assert examples[1].prompt == [user("Hi"), assistant("Hello"), user(ASK)]
    examples, _ = convert(every_other("chat_template_kwargs", {"enable_thinking": False}))
    assert [example.template_kwargs for example in examples[:2]] == [None, {"enable_thinking": False}]


@pytest.mark.parametrize(
    ("column", "cell"),
    [("context", "The board says three."), ("messages", [user("Another question?")]), ("question", "Is it late?"),
     ("choices", ["the first", "the third"]), ("chosen_reasoning", "The board says three.")],
)  # fmt: skip
def test_what_is_not_read_in_odd_rows_leaves_these_out(column, cell):
    examples, report = convert(every_other(column, cell))
    assert [example.row for example in examples] == list(range(0, 2000, 2))
    ((reason, rows),) = report.problems.items()
    assert column in reason and f"data.columns: {{{column}: null}}" in reason and rows == list(range(1, 2000, 2))
    assert len(convert(every_other(column, cell), columns={column: None})[0]) == 2000


def test_pictures_of_odd_rows_are_refused():
    assert "the column images holds something" in refused(every_other("images", ["a.png"]))


def test_a_mapping_reads_a_column_that_is_blank_in_the_first_rows(monkeypatch):
    monkeypatch.setattr("otpo.data.convert.RECOGNISED", 2)
    rows = [{**ROW, "system": system} for system in ("", "", "Be brief.")]
    assert len(convert(rows)[0]) == 2
    assert convert(rows, columns={"system": "system"})[0][2].prompt == [SYSTEM, user(ASK)]


# ---- a second column that may be the prompt ----


@pytest.mark.parametrize("column", ["instruction", "question", "query", "Question", " input", "user"])
def test_a_second_text_that_may_be_the_prompt_is_refused_unless_the_prompt_says_it(column):
    said = refused([{**ROW, column: "Is the train late?"}])
    assert (column in said and f"data.columns: {{{column}: null}}" in said) or "Say which it is" in said
    assert convert([{**ROW, column: ASK}])[0][0].prompt == ASK
    assert convert([{**ROW, column: "Is the train late?"}], columns={column: None})[0][0].prompt == ASK


def test_a_blank_prompt_does_not_hide_an_instruction():
    examples, report = convert([{**ROW, "prompt": "", "instruction": "Say where."}] * 2)
    assert report.format == "instruction" and examples[0].prompt == "Say where."
    assert "expected one column that is the prompt" in refused([{**ROW, "prompt": "", "question": ""}] * 3 + [
        {**ROW, "prompt": "", "question": "Is the train late?"}
    ])  # fmt: skip


def test_who_asked_is_no_prompt():
    assert tuple(convert([{**ROW, "user": "u123"}])[1].ignored) == ("user",)


@pytest.mark.parametrize("column", ["System", " system_prompt", "system_instruction", "systemPrompt"])
def test_a_system_prompt_is_known_in_every_spelling(column):
    assert convert([{**ROW, column: "Be brief."}])[0][0].prompt == [SYSTEM, user(ASK)]


@pytest.mark.parametrize(
    ("column", "cell"),
    [("developer", "Be brief."), ("options", ["A) first", "B) third"]), ("prefix", "Sure:"), ("Images", ["a.png"]),
     ("persona", "A pirate."), ("suffix", "Answer in French."), ("examples", [{"q": "Where?", "a": "There."}]),
     ("chosen_reasoning", "The board says three."), ("thought", "The board says three."),
     ("chosen_tool_calls", [{"name": "look", "arguments": {}}])],
)  # fmt: skip
def test_other_columns_that_belong_to_prompt_or_answer_are_refused(column, cell):
    assert f"data.columns: {{{column}: null}}" in refused([{**ROW, column: cell}])
    assert convert([{**ROW, column: cell}], columns={column: None})[0][0].prompt == ASK


@pytest.mark.parametrize("column", ["thumbs_up", "is_correct"])
def test_a_completion_that_people_call_bad_is_not_read_as_a_good_one(column):
    (example,), report = convert([{"prompt": ASK, "completion": "No idea.", column: False}])
    assert report.format == "unpaired" and example.label is False


def test_options_that_the_prompt_lists_are_no_loss():
    row = {**ROW, "prompt": "Which? A) first B) third", "options": {"text": ["first", "third"], "label": ["A", "B"]}}
    assert convert([row])[0][0].prompt == row["prompt"]


# ---- completions that name a side ----


@pytest.mark.parametrize(
    ("names", "said"),
    [(("response_a", "response_b"), ("a", "b")), (("response_a", "response_b"), ("response_b", "response_a")),
     (("answer_1", "answer_2"), ("answer_1", "answer_2")), (("response_0", "response_1"), ("0", "1"))],
)  # fmt: skip
def test_completions_that_name_a_column_are_not_trained(names, said):
    texts = dict(zip(names, ("From the third.", "No idea."), strict=True))
    row = {"prompt": ASK, **texts, "chosen": said[0], "rejected": said[1]}
    assert f"which names the column {said[0] if len(said[0]) > 1 else names[0]}" in refused([row])


def test_the_mapping_that_reads_them_reads_them():
    row = {"prompt": ASK, "response_a": "No idea.", "response_b": "From the third.", "chosen": "b", "rejected": "a"}
    ((example,), report) = convert([row], columns={"winner": "chosen", "rejected": None})
    assert report.format == "two-responses" and example.completions == ("From the third.", "No idea.")


def test_the_letter_of_an_option_that_the_prompt_lists_is_an_answer():
    row = {"prompt": "Where? A) third B) first", "A": "third", "B": "first", "chosen": "A", "rejected": "B"}
    assert convert([row])[0][0].completions == ("A", "B")


def test_white_space_in_names_of_columns_is_shown():
    said = refused([{"prompt": ASK, " chosen": "a", " rejected": "b"}])
    assert "White space belongs to the names ' chosen', ' rejected': take it out of the header" in said
