"""Columns beside those of a format: what they are taken for, and what is refused with a mapping that reads them."""

import json

import pytest
from support.chat_templates import CHATML_TOOLS, assert_rendered, tokenizer_with
from support.published_rows import assistant, user

from otpo.data.convert import convert
from otpo.data.formats.reading import reading_of
from otpo.data.tokens import tokenize_pairs
from otpo.errors import UserError

TEXTS = {"chosen": "From the third.", "rejected": "No idea."}
ASK = "Where does the train leave?"
SYSTEM = {"role": "system", "content": "Be brief."}


def read(row, **settings):
    (example,), report = convert([row], **settings)
    return example, report


def refused(rows, **settings):
    with pytest.raises(UserError) as error:
        convert(rows, "pairs.json", **settings)
    return str(error.value)


# ---- what belongs to the prompt in every format ----


@pytest.mark.parametrize("column", ["system", "system_prompt", "system_message"])
def test_a_system_column_is_the_systems_message_and_makes_messages_of_strings(column):
    tokenizer = tokenizer_with(CHATML_TOOLS)
    rows = [{column: text, "prompt": ASK, **TEXTS} for text in ("Be brief.", "", None)]
    pairs, report = tokenize_pairs(rows, tokenizer)
    assert report.template == "chat" and f"with system{f' ({column})' * (column != 'system')}" in report.why
    for pair, before in zip(pairs, ([SYSTEM], [], []), strict=True):
        assert_rendered(tokenizer, pair, [*before, user(ASK)], assistant(TEXTS["chosen"]), assistant(TEXTS["rejected"]))


@pytest.mark.parametrize("cell", [SYSTEM, [SYSTEM], json.dumps(SYSTEM), json.dumps([SYSTEM])])
def test_a_system_column_may_hold_the_systems_message(cell):
    good = {"system": cell, "prompt": ASK, **TEXTS}
    examples, report = convert([good, good | {"system": json.dumps([user(ASK)])}])
    assert [example.prompt for example in examples] == [[SYSTEM, user(ASK)]]
    assert report.problems == {"system holds messages: expected a text, or one message of the system": [1]}


def test_a_system_column_without_words_changes_nothing():
    example, report = read({"system": "  ", "prompt": ASK, **TEXTS})
    assert example.prompt == ASK and report.template == "literal"


def test_a_system_column_and_a_system_message_must_agree():
    good = {"system": "Be brief.", "prompt": [SYSTEM, user(ASK)], **TEXTS}
    examples, report = convert([good, good | {"system": "Be long."}])
    assert examples[0].prompt == [SYSTEM, user(ASK)]
    assert report.problems == {"the system column and the prompt's system message differ": [1]}


def test_a_system_column_has_no_place_in_a_literal_prompt():
    assert "expected strings, because the template is literal" in refused(
        [{"system": "Be brief.", "prompt": ASK, **TEXTS}], template="literal"
    )


def test_transcripts_with_a_system_prompt_become_messages():
    text = "\n\nHuman: Is it?\n\nAssistant:"
    row = {"system": "Be brief.", "chosen": text + " Yes.", "rejected": text + " No."}
    assert read(row)[0].prompt == [SYSTEM, user("Is it?")]


@pytest.mark.parametrize("written", [list, json.dumps, str, lambda tools: [json.dumps(tool) for tool in tools]])
def test_tools_are_objects_or_text_of_them(written):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"a": None}}}]
    example, _ = read({"tools": written(tools), "prompt": ASK, **TEXTS})
    assert example.tools == tools and example.prompt == [user(ASK)]
    assert read({"tools": "[]", "prompt": ASK, **TEXTS})[0].tools is None
    assert "tools is neither a list of objects nor JSON of one" in refused(
        [{"tools": "def f(a): ...", "prompt": ASK, **TEXTS}]
    )


def test_variables_of_the_chat_template_may_stand_in_a_column():
    row = {"chat_template_kwargs": {"enable_thinking": False, "other": None}, "prompt": [user(ASK)], **TEXTS}
    assert read(row)[0].template_kwargs == {"enable_thinking": False}
    assert read(row | {"chat_template_kwargs": '{"enable_thinking": true}'})[0].template_kwargs == {
        "enable_thinking": True
    }


# ---- data.columns ----


def test_a_mapping_reads_columns_of_any_name():
    row = {"frage": ASK, "gut": "Yes.", "schlecht": "No.", "rolle": "Be brief.", "prompt": "not this one"}
    columns = {"prompt": "frage", "chosen": "gut", "rejected": "schlecht", "system": "rolle"}
    example, report = read(row, columns=columns)
    assert (example.prompt, *example.completions) == ([SYSTEM, user(ASK)], "Yes.", "No.")
    assert "columns prompt (frage), chosen (gut), rejected (schlecht)" in report.why


def test_a_mapping_leaves_columns_out():
    row = {"system": "Be brief.", "prompt": ASK, **TEXTS}
    assert read(row, columns={"system": None})[0].prompt == ASK


def test_a_mapping_that_cannot_be_is_refused_with_what_can():
    rows = [{"prompt": ASK, **TEXTS}]
    assert "pairs.json has no column frage; it has prompt, chosen, rejected" in refused(
        rows, columns={"prompt": "frage"}
    )
    assert "'frage' is nothing that a column can be: expected " in refused(rows, columns={"frage": "prompt"})


def test_a_mapping_that_would_read_nothing_is_not_proposed():
    said = refused([{"prompt": ASK, "responses": ["Yes.", "No."], "rank": [1, 0]}])
    assert "no known format" in said and "completion: responses" not in said


# ---- columns that would be dropped ----


def test_columns_that_are_not_read_are_listed():
    row = {"id": 7, "prompt": ASK, **TEXTS, "source": "Ask.", "margin": 1.5, "note": ""}
    _, report = read(row)
    assert tuple(report.ignored) == ("id", "source")
    assert "ignored   columns that are not read: id, source" in report.lines()


def test_two_strings_that_begin_alike_do_not_hide_the_column_of_the_prompt():
    rows = [{"frage": f"What is {n} and {n}?", "chosen": f"It is {2 * n}.", "rejected": "It is 7."} for n in range(4)]
    said = refused(rows)
    assert "found the columns chosen, rejected, frage" in said and "data.columns: {prompt: frage}" in said
    examples, _ = convert(rows, columns={"prompt": "frage"})
    assert examples[2].prompt == "What is 2 and 2?"
    assert convert(rows, columns={"frage": None})[0][0].prompt == "It is"


def test_completions_that_share_no_beginning_are_no_implicit_prompt():
    said = refused([{"chosen": "Yes.", "rejected": "No.", "frage": 3}])
    assert "which begin alike in 0 of 1 rows" in said and "data.columns: {prompt: frage}" in said
    assert read({"prompt": "", "chosen": "Yes.", "rejected": "No."})[0].prompt == ""


@pytest.mark.parametrize("column", ["input", "context", "article", "knowledge"])
def test_a_text_to_the_question_is_not_dropped(column):
    row = {"question": "Who sold it?", column: "Anna sold the bicycle.", "chosen": "Anna.", "rejected": "Eva."}
    said = refused([row])
    assert f"the column {column} says something that the prompt does not" in said or "expected one column" in said
    example, _ = read(row, columns={"prompt": "question", "input": column})
    assert example.prompt == "Who sold it?\n\nAnna sold the bicycle."
    assert read(row, columns={"prompt": "question", column: None})[0].prompt == "Who sold it?"
    same = {"prompt": "Anna sold the bicycle. Who sold it?", column: "Anna sold the bicycle.", **TEXTS}
    assert read(same)[0].prompt == same["prompt"]


def test_documents_beside_a_prompt_are_not_dropped():
    row = {"prompt": "Who sold it?", "documents": [{"title": "Letter", "text": "Anna sold it."}], **TEXTS}
    said = refused([row])
    assert "the column documents says something" in said and "puts it after" not in said
    assert read(row, columns={"documents": None})[0].prompt == "Who sold it?"


def test_of_two_system_prompts_none_is_guessed():
    row = {"system": "Be brief.", "system_prompt": "Be long.", "prompt": ASK, **TEXTS}
    assert "expected one column that is the system, found system, system_prompt" in refused([row])
    assert read(row, columns={"system": "system_prompt"})[0].prompt[0]["content"] == "Be long."


def test_of_several_columns_that_may_be_the_prompt_none_is_guessed():
    said = refused([{"question": "Is it?", "query": "Was it?", **TEXTS}])
    assert "expected one column that is the prompt, found question, query" in said
    assert "data.columns: {prompt: question} or data.columns: {prompt: query}" in said
    said = refused([{"question": "Is it?", "answer": "B", "solution": "Since ..., B."}])
    assert "expected one column that is the completion, found answer, solution" in said


def test_pictures_are_refused():
    row = {"prompt": ASK, **TEXTS, "images": ["a.png"]}
    assert "the column images holds something, and only text can be trained on" in refused([row])
    assert read(row | {"images": []})[0].prompt == ASK
    assert read(row, columns={"images": None})[0].prompt == ASK


def test_messages_beside_a_prompt_must_say_the_same():
    turns = [user(ASK), assistant(TEXTS["chosen"])]
    for messages in (turns, turns[:1]):
        assert read({"prompt": ASK, **TEXTS, "messages": messages})[0].prompt == ASK
    said = refused([{"prompt": ASK, **TEXTS, "messages": [user("Another question?")]}])
    assert "messages says something else than the prompt (data.columns: {messages: null} leaves" in said
    assert "prompt says something else" in refused([{"prompt": "Another question?", "messages": turns}])
    assert "says something else" in refused([{"prompt": ASK, **TEXTS, "messages": [SYSTEM, *turns]}])


def test_conversations_go_on_with_a_prompt_of_messages_or_hold_it():
    """TRL keeps a prompt of messages beside conversations, too."""
    tokenizer, more = tokenizer_with(CHATML_TOOLS), [user("Sure?")]
    talk = [user("My name is Bob."), assistant("Hi Bob.")]
    for prompt, begin, whole in (
        ([SYSTEM], [user(ASK)], [SYSTEM, user(ASK)]),
        (talk, more, [*talk, *more]),
        ([user(ASK)], [user(ASK)], [user(ASK)]),
        ([user(ASK)], [SYSTEM, user(ASK)], [SYSTEM, user(ASK)]),
        (f" {ASK}\n", [SYSTEM, user(ASK)], [SYSTEM, user(ASK)]),
        ([user(ASK), assistant("Hm.")], [user(ASK), assistant("Hm."), *more], [user(ASK), assistant("Hm."), *more]),
    ):
        row = {"prompt": prompt, "chosen": [*begin, assistant("A.")], "rejected": [*begin, assistant("B.")]}
        for each in (row, row | {"score_chosen": 2, "score_rejected": 1}):
            (pair,), _ = tokenize_pairs([each], tokenizer)
            assert_rendered(tokenizer, pair, whole, assistant("A."), assistant("B."))


@pytest.mark.parametrize(
    ("prompt", "begin"),
    [(ASK, [SYSTEM]), ("Another question?", [user(ASK)]), ([user("Another question?")], [user(ASK)]),
     ([user(ASK)], [SYSTEM]), ([SYSTEM, user("Another?")], [user(ASK)]), ([user(ASK), assistant("A.")], [user(ASK)])],
)  # fmt: skip
def test_conversations_beside_another_prompt_are_refused(prompt, begin):
    row = {"prompt": prompt, "chosen": [*begin, assistant("C.")], "rejected": [*begin, assistant("D.")]}
    assert "do not begin with the prompt (data.columns: {prompt: null} reads them alone)" in refused([row])
    assert read(row, columns={"prompt": None})[0].prompt == begin


def test_completions_that_repeat_the_prompt_are_noted():
    row = {"prompt": ASK, "chosen": f"{ASK} Here.", "rejected": f"{ASK} There."}
    assert "both completions begin with the text of the prompt" in read(row)[1].notes


def test_a_format_is_told_by_a_sample_spread_over_all_rows():
    rows = [{"prompt": ASK, **TEXTS}] * 3000 + [{"question": ASK, **TEXTS}] * 2999
    assert reading_of(rows).names == {}
    assert reading_of(rows[::-1]).names == {}


def test_a_column_that_comes_late_is_not_dropped(monkeypatch):
    monkeypatch.setattr("otpo.data.convert.RECOGNISED", 2)
    rows = [{"prompt": ASK, **TEXTS}] * 3
    _, report = convert([*rows, {**rows[0], "system": "Be brief."}, {**rows[0], "system": ""}])
    reads = "data.columns: {system: system} reads it, data.columns: {system: null} leaves it out"
    assert report.problems == {f"the column system says something that is not read ({reads})": [3]}
