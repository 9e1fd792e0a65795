"""Rows that say two things are counted, and a base never learns from completions that are labelled bad."""

import io
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from support.chat_templates import CHATML_TOOLS, tokenizer_with

from otpo.data.convert import OPPOSITE, convert
from otpo.data.load import load_rows
from otpo.data.token_file import load_tokens
from otpo.data.tokens import read_tokens
from otpo.errors import UserError
from pipeline.recipe import make_recipe
from pipeline.train.tokens import prepare_tokens

LOW = "chosen completion scored below the rejected one"


def pair(prompt, chosen, rejected, **columns):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def test_a_pair_the_other_way_round_is_counted_and_used():
    rows = [pair("q", "a", "b"), pair("q", "b", "a"), pair("r", "b", "a"), pair("q", "b", "a"), pair("q", "a", "b")]
    examples, report = convert(rows)
    assert report.notes[OPPOSITE] == [1, 3, 4] and len(examples) == 5
    assert report.notes["duplicate row"] == [3, 4]
    assert OPPOSITE not in convert(rows[:1] + rows[2:3])[1].notes


def test_a_completion_with_both_labels_is_counted():
    rows = [{"prompt": "q", "completion": text, "label": good} for text, good in (("a", 1), ("b", 0), ("a", 0))]
    assert convert(rows)[1].notes[OPPOSITE] == [2]
    plain = [{"prompt": "q", "completion": "a"}] * 2
    assert OPPOSITE not in convert(plain)[1].notes


@pytest.mark.parametrize(
    ("of_chosen", "of_rejected"),
    [("chosen_score", "rejected_score"), ("chosen-rating", "rejected-rating"), ("rating_chosen", "rating_rejected"),
     ("chosen_avg_rating", "rejected_avg_rating"), ("Reward chosen", "Reward rejected")],
)  # fmt: skip
def test_scores_that_contradict_the_choice_are_counted_under_any_name(of_chosen, of_rejected):
    rows = [pair(f"q{i}", "a", "b", **{of_chosen: i, of_rejected: 1}) for i in range(3)]
    report = convert(rows)[1]
    assert report.format == "preference" and report.notes == {LOW: [0], "equal scores": [1]}


def test_scores_of_mapped_columns_are_not_compared():
    """Whoever swaps the completions knows better than their names."""
    rows = [pair("q", "a", "b", chosen_score=1, rejected_score=2)]
    assert convert(rows, columns={"chosen": "rejected", "rejected": "chosen"})[1].notes == {}


def test_a_base_takes_only_what_is_not_labelled_bad():
    rows = [{"prompt": f"q{i}", "completion": f"answer {i}", "label": i % 2 == 0} for i in range(4)]
    tokenizer = tokenizer_with(CHATML_TOOLS)
    items, report = read_tokens(rows, tokenizer, pairs=False, good=True)
    assert [item.row for item in items] == [0, 2]
    assert report.problems == {"label says that the completion is bad": [1, 3]}
    assert [item.row for item in read_tokens(rows, tokenizer, pairs=False)[0]] == [0, 1, 2, 3]  # for KTO
    with pytest.raises(UserError, match="none of the 2 rows can be used: 2 label says that the completion is bad"):
        list(read_tokens(rows[1::2], tokenizer, pairs=False, good=True)[0])


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"trainable": False}, {"loss": False}]
)
def test_an_answer_that_is_not_to_be_trained_on_is_not(mark):
    asked, said = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    marked = [{"messages": [asked, said | mark]}, {"messages": [asked, said | {"weight": 1, "train": True}]}]
    examples, report = convert(marked)
    assert [example.row for example in examples] == [1]
    assert report.problems == {"completion is marked as not to be trained on": [0]}
    rows = [{"prompt": [asked | mark], "chosen": [said], "rejected": [said | {"content": "b"}]}]
    assert convert(rows)[1].n_usable == 1  # a prompt never is


def test_the_base_of_a_run_is_trained_on_good_completions_alone(tmp_path, tiny_llama):
    rows = [{"prompt": f"q{i}", "completion": f"answer {i}", "label": i % 2 == 0} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = str(tmp_path / "rows.jsonl")
    recipe = make_recipe({"name": "x", "model": str(tiny_llama), "base": {"data": source}})
    tokens = prepare_tokens(recipe, tmp_path, model=str(tiny_llama), source=source, supervised=True)
    assert load_tokens(tokens.train).rows.tolist() == [0, 2]


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path):
    table = pa.table([["q"], ["a"], ["b"], ["z"]], names=["prompt", "chosen", "rejected", "chosen"])
    with io.BytesIO() as sink:
        pyarrow.parquet.write_table(table, sink)
        (tmp_path / "rows.parquet").write_bytes(sink.getvalue())
    with pytest.raises(UserError, match="has the column 'chosen' twice"):
        load_rows(tmp_path / "rows.parquet")
