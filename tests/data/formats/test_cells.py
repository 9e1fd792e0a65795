"""What single cells may hold: messages as text, ShareGPT's, parts, tool calls, labels, bytes and nothing."""

import json
import math

import pyarrow as pa
import pyarrow.parquet
import pytest
from support.published_rows import assistant, user

from otpo.data.convert import convert
from otpo.data.formats.cells import label_of, text_of
from otpo.data.load import load_rows
from otpo.data.rows import BadRow
from otpo.errors import UserError

ASK, YES = [user('Say "hi" to\nAnna\'s sister.')], [assistant("Hi 😀")]
GOOD = {"prompt": "a", "chosen": "b", "rejected": "c"}


def text(value):
    return text_of({"cell": value}, "cell")


@pytest.mark.parametrize(
    "written",
    [json.dumps, str, lambda value: json.dumps(json.dumps(value)), lambda value: "\n " + json.dumps(value, indent=1),
     lambda value: json.dumps(value).encode(), lambda value: [json.dumps(each) for each in value]],
)  # fmt: skip
def test_messages_may_be_text_in_any_way_that_tables_write_it(written):
    messages = [*ASK, *YES]
    assert text(written(messages)) == messages
    assert text(written(YES)) == YES


def test_csv_and_parquet_with_messages_as_text_give_what_json_gives(tmp_path):
    rows = [{"prompt": ASK, "chosen": YES, "rejected": [assistant("No.")]}]
    texts = [{column: str(cell) for column, cell in row.items()} for row in rows]
    pyarrow.parquet.write_table(pa.Table.from_pylist(texts), tmp_path / "rows.parquet")
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row.values()) for row in texts]
    (tmp_path / "rows.csv").write_text("\n".join(["prompt,chosen,rejected", *quoted]))
    wanted = convert(rows)[0]
    for name in ("rows.csv", "rows.parquet"):
        assert convert(load_rows(tmp_path / name))[0] == wanted != []


@pytest.mark.parametrize(
    "plain",
    ["[INST] Hello", "[1, 2]", '["a", "b"]', '{"answer": 4}', '{"role": "admin", "content": "x"}', "[{", "{'a': 1}",
     '[{"name": "role"}]', '"quoted"', "array([1])", "[" * 5000, '{"role": "user"}', "null", "12"],
)  # fmt: skip
def test_text_that_only_begins_like_messages_stays_text(plain):
    assert text(plain) == plain


@pytest.mark.parametrize(
    "broken",
    ["[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]",
     "array([{'content': 'a', 'role': 'user'}], dtype=object)", '[{"role": "user", "content": "cut of'],
)  # fmt: skip
def test_messages_as_text_that_cannot_be_parsed_are_not_trained_as_text(broken):
    with pytest.raises(BadRow, match="looks like messages, and is neither JSON nor a Python literal"):
        text(broken)


@pytest.mark.parametrize(
    ("value", "messages"),
    [
        ({"role": "user", "content": "a"}, [user("a")]),
        ([{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
         [{"role": "system", "content": "s"}, user("a"), assistant("b")]),
        ([{"role": "User", "content": "a"}, {"role": "model", "content": "b"}], [user("a"), assistant("b")]),
        ([{"role": "user", "content": "a", "name": None, "weight": 0}], [{**user("a"), "weight": 0}]),
        ([{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}], [user("a b")]),
        ([{"role": "user", "content": ["a", {"text": "b"}]}], [user("ab")]),
        ([{"role": "user", "parts": [{"text": "a"}]}, {"role": "model", "parts": [{"text": "b"}]}],
         [user("a"), assistant("b")]),
        ([{"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}], [user("a"), assistant("b")]),
        ([{"role": "USER", "message": "a"}, {"role": "CHATBOT", "message": "b"}], [user("a"), assistant("b")]),
        ([{"from": "human", "value": "a", "content": "a"}], [user("a")]),
        ([{"role": "user", "content": {"type": "text", "text": "a"}}], [user("a")]),
        ([{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}],
         [{"role": "assistant", "content": None,
           "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}]),
        ([{"role": "assistant", "tool_calls": '[{"name": "f", "arguments": {}}]'}],
         [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}}]}]),
        ([{"role": "assistant", "reasoning_content": "Hm.", "content": None}],
         [{"role": "assistant", "content": None, "reasoning_content": "Hm."}]),
        ([{"role": "ipython", "content": "12"}], [{"role": "ipython", "content": "12"}]),
    ],
)  # fmt: skip
def test_messages_are_read_in_every_common_spelling(value, messages):
    assert text(value) == messages


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "no cell"), (math.nan, "no cell"), (3, "neither a string nor a list"), (b"\xff", "not UTF-8"),
        ([3], "a list of something else than messages"), (["a", "b"], "a list of something else than messages"),
        ([{"content": "a"}], "a message without a role"),
        ([{"from": "human", "value": "a", "content": "b"}], "two contents that differ"),
        ('[{"role": "customer", "content": "a"}]', "looks like messages, in a form that is not known"),
        ('[{"speaker": "user", "content": "a"}]', "looks like messages, in a form that is not known"),
        ([{"role": "user"}], "a message without content"),
        ([{"role": "user", "content": 3}], "whose content is not text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "not text (image_url)"),
        ([{"from": "narrator", "value": "a"}], "a message from 'narrator'"),
        ([{"from": "function_call", "value": "f(a)"}], "function_call is neither a list of objects nor JSON"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"arguments": {}}]}], "a tool call without a name"),
    ],
)  # fmt: skip
def test_cells_that_are_no_text_are_refused_by_reason(value, reason):
    with pytest.raises(BadRow) as error:
        text(value)
    assert reason in str(error.value)


def test_a_tool_call_is_an_answer_and_two_of_them_are_told_apart():
    def call(city):
        function = {"name": "weather", "arguments": {"city": city}}
        return [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}]

    rows = [{"prompt": ASK, "chosen": call("Rome"), "rejected": call(other)} for other in ("Oslo", "Rome")]
    examples, report = convert(rows)
    assert [example.row for example in examples] == [0] and report.problems == {"identical completions": [1]}
    _, report = convert([rows[0], {**rows[0], "chosen": [assistant("")]}])
    assert report.problems == {"chosen is empty": [1]}


@pytest.mark.parametrize(
    ("cells", "label"),
    [((True, "True", "1", 1, 1.0, "yes", "desirable", b"true", " good "), True),
     ((False, "false", "0", 0, -1, "no", "Undesirable", "bad"), False),
     ((None, "", "maybe", 2, [], {}, math.nan, b"\xff"), None)],
)  # fmt: skip
def test_labels_are_read_in_every_common_spelling(cells, label):
    assert [label_of(cell) for cell in cells] == [label] * len(cells)


@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_labelled_completions_are_read_in_every_shape(column):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    shapes = (
        ({"prompt": "a", "response": "b"}, "a"),
        ({"instruction": "a", "input": "x", "output": "b"}, "a\n\nx"),
        ({"conversations": turns}, [user("a")]),
    )
    for row, prompt in shapes:
        examples, report = convert([{**row, column: value} for value in ("true", "0")])
        assert [(e.prompt, e.label) for e in examples] == [(prompt, True), (prompt, False)]
        assert report.labels == {"true": 1, "false": 1}


def test_labels_that_are_classes_are_no_judgement():
    _, report = convert([{"prompt": "a", "completion": "b", "label": "sports"}])
    assert report.format == "prompt-completion" and tuple(report.ignored) == ("label",)


def test_nulls_that_a_table_puts_into_objects_are_not_rendered(tmp_path):
    """A table's objects have all keys of all rows."""
    tools = [
        [{"name": "f", "parameters": {"city": {"type": "string"}}}],
        [{"name": "g", "parameters": {"n": {"max": 3}}}],
    ]
    rows = [{"tools": tool, "prompt": ASK, "chosen": YES, "rejected": [assistant("No.")]} for tool in tools]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [example.tools for example in convert(load_rows(tmp_path / "rows.parquet"))[0]] == tools


MESSAGE = '{"role": "assistant", "content": "hi"}'


@pytest.mark.parametrize(
    "row",
    [{"prompt": "Write a message as JSON.", "chosen": MESSAGE, "rejected": "no"},
     {"prompt": "Write one.", "chosen": "no", "rejected": f"[{MESSAGE}]"}],
)  # fmt: skip
def test_messages_as_text_among_plain_texts_are_left_out(row):
    examples, report = convert([GOOD, row])
    assert [example.row for example in examples] == [0]
    ((reason, rows),) = report.problems.items()
    assert "is messages as text, and plain text in most rows" in reason and rows == [1]
    with pytest.raises(UserError, match="plain text in most rows"):
        convert([row])


def test_completions_may_be_messages_as_text_beside_a_plain_prompt():
    row = {"prompt": "a", "chosen": MESSAGE, "rejected": f"[{MESSAGE.replace('hi', 'no')}]"}
    assert convert([row])[0][0].completions == ([assistant("hi")], [assistant("no")])


def test_prompts_that_are_lists_of_texts_are_refused():
    with pytest.raises(UserError, match="the column prompt holds lists of texts"):
        convert([{"prompt": '["Q1", "Q2"]', "chosen": '["a", "b"]', "rejected": '["c", "d"]'}])


@pytest.mark.parametrize("scale", [(1, 1, 1, 2, 5), (-1, 0, 1, 1), ("1", "1", "3"), (1.0, 1, 0.5), (1, 2, 3, 4, 5)])
def test_numbers_of_a_scale_are_no_labels(scale):
    rows = [{"prompt": "a", "completion": f"b{at}", "label": label} for at, label in enumerate(scale)]
    with pytest.raises(UserError, match="expected labels that say whether a completion is good, found the numbers"):
        convert(rows)
    assert len(convert(rows, columns={"label": None})[0]) == len(rows)


def test_what_stands_beside_messages_in_openais_format_is_not_dropped():
    row = {"preferred_output": YES, "non_preferred_output": [assistant("No.")]}
    for key in ("functions", "instructions", "system"):
        with pytest.raises(UserError, match=f"input has {key}, which is not read"):
            convert([row | {"input": {"messages": ASK, key: [{"name": "f"}] if key == "functions" else "Be brief."}}])
    assert convert([row | {"input": {"messages": ASK, "parallel_tool_calls": True}}])[0][0].prompt == ASK
