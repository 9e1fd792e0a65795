"""Prompt sets and outputs: every accepted format, and what is said about the others."""

import gzip
import json

import pandas as pd
import pytest

from eval.outputs.matching import match_outputs, rows_of_prompts, with_inputs_of, with_instructions_of
from eval.outputs.reading import load_outputs
from eval.stats.verbosity import verbosity
from eval.tasks import SUMMARIZE, load_task, transcript
from otpo.data.formats.reading import reading_of
from otpo.errors import UserError

ROWS = [{"instruction": "What is 2 + 2?", "id": 7}, {"instruction": "Name a river.\nOnly one.", "dataset": "geo"}]


def write(path, rows):
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    if plain.suffix == ".parquet":
        data = pd.DataFrame(rows).to_parquet()
    elif plain.suffix == ".csv":
        data = pd.DataFrame(rows).to_csv(index=False).encode()
    elif plain.suffix == ".jsonl":
        data = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    else:
        data = json.dumps(rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet", "a.json.gz", "a.jsonl.gz", "a.csv.gz"])
def test_every_file_format_gives_the_same_prompts(tmp_path, name):
    rows = [{"instruction": "Ünï — \u2028 NA", "output": "4"}, {"instruction": "Name\na river.", "output": "Nile"}]
    task = load_task(str(write(tmp_path / name, rows)))
    assert [(p.instruction, p.reference, p.id) for p in task.prompts] == [
        ("Ünï — \u2028 NA", "4", "0"),
        ("Name\na river.", "Nile", "1"),
    ]
    assert (task.name, task.kind) == ("a", "instruction")


def test_rows_keep_their_id_and_dataset(tmp_path):
    first, second = load_task(str(write(tmp_path / "a.json", ROWS)), name="mine").prompts
    assert (first.id, first.dataset, first.reference) == ("7", "mine", None)
    assert (second.id, second.dataset) == ("1", "geo")


@pytest.mark.parametrize("key", ["messages", "prompt"])
@pytest.mark.parametrize("name", ["a.json", "a.parquet"])
def test_conversations_are_kept_and_shown_as_a_transcript(tmp_path, key, name):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    turns.append({"role": "user", "content": "Bye"})
    [prompt] = load_task(str(write(tmp_path / name, [{key: turns}]))).prompts
    assert prompt.messages == turns
    assert prompt.instruction == "User: Hi\n\nAssistant: Hello!\n\nUser: Bye"


def test_a_single_user_turn_is_its_own_transcript():
    assert transcript([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]) == "Hi"


def test_posts_become_a_summarization_task(tmp_path):
    rows = [{"post": "My dog ate {output_1}.", "summary": "Dog ate it."}]
    task = load_task(str(write(tmp_path / "posts.jsonl", rows)))
    assert task.kind == "summarization"
    assert task.prompts[0].instruction == SUMMARIZE + "\n\nMy dog ate {output_1}."
    assert task.prompts[0].reference == "Dog ate it."


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_a_prompt_has_all_that_training_would_read(tmp_path, name):
    """Alpaca's `input`, a system prompt, tools and earlier turns, also as the text that CSV makes of them."""
    rows = [
        {"instruction": "Add them.", "input": "2 and 3"},
        {"instruction": "Add them.", "input": ""},
        {"instruction": "Add them.", "system": "Be brief."},
        {"instruction": "And now?", "history": json.dumps([["Hi", "Hello!"]]), "system": "Be brief."},
        {"instruction": "Add them.", "input": "2 and 3", "tools": json.dumps(TOOLS)},
    ]
    columns = {column for row in rows for column in row}
    full = [{column: row.get(column, "") for column in sorted(columns)} for row in rows]
    joined, bare, system, history, tools = load_task(str(write(tmp_path / name, full))).prompts
    assert joined.instruction == "Add them.\n\n2 and 3" and joined.messages is None
    assert bare.instruction == "Add them." and bare.messages is bare.tools is None
    assert system.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add them."}]
    assert system.instruction == "System: Be brief.\n\nUser: Add them."
    assert [m["content"] for m in history.messages] == ["Be brief.", "Hi", "Hello!", "And now?"]
    assert tools.tools == TOOLS and tools.messages == [{"role": "user", "content": "Add them.\n\n2 and 3"}]
    assert tools.instruction == f"Tools: {json.dumps(TOOLS)}\n\nAdd them.\n\n2 and 3"
    for row, prompt in zip(full, (joined, bare, system, history, tools), strict=True):
        [trained] = read_examples([{**row, "chosen": "a", "rejected": "b"}])
        assert trained.prompt == (prompt.messages or prompt.instruction) and trained.tools == prompt.tools


def read_examples(rows):
    reading = reading_of(rows)
    return [reading.parts(reading.renamed(row)) for row in rows]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Who wrote it?", "context": "The Odyssey"}, "the column context says something that the prompt"),
        ({"instruction": "What is it?", "image": "cat.png"}, "the column image holds something"),
        ({"instruction": "Add.", "tools": "no json"}, "tools is neither a list of objects nor JSON"),
        ({"instruction": "Add.", "input": 5}, "input is not a string"),
    ],
)
def test_a_column_that_would_be_dropped_is_named(tmp_path, row, said):
    with pytest.raises(UserError, match=rf"1 of 2 rows are no prompt \(rows 1, .*{said}"):
        load_task(str(write(tmp_path / "a.json", [{"instruction": "fine"}, row])))


def test_what_the_prompt_holds_already_is_fine(tmp_path):
    row = {"prompt": "Who wrote the Odyssey?", "context": "the Odyssey", "reference_text": None}
    assert load_task(str(write(tmp_path / "a.json", [row]))).prompts[0].instruction == row["prompt"]


@pytest.mark.parametrize("name", ["o.json", "o.csv"])
def test_the_input_of_outputs_is_a_part_of_the_instruction(tmp_path, name):
    rows = [
        row | {"instruction": "Translate.", "input": text}
        for row, text in zip(outputs("a", "b", "c"), ("one", "two", ""), strict=True)
    ]
    model = load_outputs(write(tmp_path / name, rows))
    assert [row["instruction"] for row in model] == ["Translate.\n\none", "Translate.\n\ntwo", "Translate."]
    again = load_outputs(write(tmp_path / "again.json", model))
    assert [row["instruction"] for row in again] == [row["instruction"] for row in model]
    bare = outputs("Translate.", "Translate.", "Translate.", generator="ref")
    pairs = match_outputs(model, with_inputs_of(model, bare))
    assert [(p.instruction, p.reference) for p in pairs] == [
        ("Translate.\n\none", "ref 0"), ("Translate.\n\ntwo", "ref 1"), ("Translate.", "ref 2")
    ]  # fmt: skip
    other = load_outputs(write(tmp_path / "ref.json", [bare[0] | {"input": "one"}, bare[1] | {"input": "three"}]))
    with pytest.raises(UserError, match="three"):
        match_outputs(model[:2], with_inputs_of(model[:2], other))


def test_instructions_that_differ_in_white_space_alone_are_matched_and_counted():
    reference = outputs("a b", "line\ntwo", "caf\u00e9", "c", generator="ref")
    model = outputs("a b \n", "line \r\ntwo", "cafe\u0301", "c")
    rows, changed = with_instructions_of(model, reference)
    assert changed == 3 and [row["instruction"] for row in rows] == ["a b", "line\ntwo", "caf\u00e9", "c"]
    assert len(match_outputs(rows, reference)) == 4
    assert with_instructions_of(outputs("a  b"), reference)[1] == 0  # within a line it may be what was asked


def test_half_a_surrogate_pair_is_read_as_a_replacement_character(tmp_path):
    (tmp_path / "o.json").write_text(json.dumps([{"instruction": "a \ud83d", "output": "b \ude00 \U0001f600"}]))
    [row] = load_outputs(tmp_path / "o.json")
    assert (row["instruction"], row["output"]) == ("a \ufffd", "b \ufffd \U0001f600")


def test_an_input_that_is_the_whole_prompt_is_not_said_twice(tmp_path):
    [row] = load_outputs(write(tmp_path / "o.json", [outputs("Name a river.")[0] | {"input": "Q: Name a river. A:"}]))
    assert row["instruction"] == "Name a river."


def test_limit_takes_the_first(tmp_path):
    path = str(write(tmp_path / "a.json", [{"prompt": text} for text in "abacab"]))
    assert [p.instruction for p in load_task(path).prompts] == list("abacab")
    assert [p.instruction for p in load_task(path, limit=3).prompts] == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.json", None, "found nothing there"),
        ("broken.json", b'[{"instruction": ', "is not JSON"),
        ("broken.json.gz", b"no gzip", "is not JSON"),
        ("broken.parquet", b"no parquet", "is not parquet"),
        ("empty.json", b"[]", "holds no rows"),
        ("values.json", b"[1, 2]", "row 0 is 1"),
        ("columns.json", b'[{"instruction": "a"}, {"question": "b"}]', "1 of 2 rows.*rows 1.*question"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"(?s){name}.*{said}"):
        load_task(str(path))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'alpaca': expected one of alpaca_eval, tldr"):
        load_task("alpaca")


@pytest.mark.parametrize("name", ["alpaca_eval", "tldr"])
def test_an_unreachable_hub_asks_for_a_file(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(UserError, match=r"(?s)Hugging Face hub.*Give a file of prompts"):
        load_task(name)


def outputs(*texts, generator="model"):
    return [{"instruction": t, "output": f"{generator} {i}", "generator": generator} for i, t in enumerate(texts)]


def test_outputs_are_laid_beside_the_reference_by_instruction_in_its_order():
    pairs = match_outputs(outputs("b", "c", "a"), outputs("a", "b", "c", generator="ref"))
    assert [(p.index, p.instruction, p.output, p.reference) for p in pairs] == [
        (0, "a", "model 2", "ref 0"),
        (1, "b", "model 0", "ref 1"),
        (2, "c", "model 1", "ref 2"),
    ]
    assert (pairs[0].generator, pairs[0].reference_generator) == ("model", "ref")


def test_repeated_instructions_are_matched_in_order():
    model, reference = outputs("a", "b", "a"), outputs("a", "a", "b", generator="ref")
    assert [(p.output, p.reference) for p in match_outputs(model, reference)] == [
        ("model 0", "ref 0"),
        ("model 2", "ref 1"),
        ("model 1", "ref 2"),
    ]
    assert [row["output"] for row in rows_of_prompts(["b", "a", "a"], model, "m")] == ["model 1", "model 0", "model 2"]
    with pytest.raises(UserError, match=r"outputs of m: expected one for each of the 3 .* 1 are missing .*'a'"):
        rows_of_prompts(["a", "a", "a"], model, "m")


def test_other_instructions_are_refused_with_counts_and_examples():
    with pytest.raises(UserError, match=r"2 outputs have no reference, e\.g\. 'x'; 'y'.*1 instructions .*'b'"):
        match_outputs(outputs("a", "x", "y"), outputs("a", "b", generator="ref"))


def test_a_part_is_judged_only_when_asked_for():
    with pytest.raises(UserError, match="1 instructions of the reference have no output"):
        match_outputs(outputs("b"), outputs("a", "b", generator="ref"))
    assert [p.index for p in match_outputs(outputs("b"), outputs("a", "b", generator="ref"), subset=True)] == [1]
    with pytest.raises(UserError, match="1 outputs have no reference"):
        match_outputs(outputs("b", "x"), outputs("a", "b", generator="ref"), subset=True)


@pytest.mark.parametrize("name", ["o.csv", "o.json", "o.parquet"])
def test_counts_and_truths_that_are_text_are_read(tmp_path, name):
    """CSV knows text alone, where "False" is as true as "True" and "12" cannot be averaged."""
    cuts, counts = ["False", "true", "0", "", "1"], ["12", "7.0", "", "NaN", " 3 "]
    rows = [row | {"truncated": c, "n_tokens": n} for row, c, n in zip(outputs(*"abcde"), cuts, counts, strict=True)]
    read = load_outputs(write(tmp_path / name, rows))
    assert [row["truncated"] for row in read] == [False, True, False, None, True]
    assert [row["n_tokens"] for row in read] == [12, 7, None, None, 3]
    numbers = verbosity([1.5] * 5, [1] * 5, [1] * 5, *([row[key] for row in read] for key in ("n_tokens", "truncated")))
    assert numbers["truncation_rate"] == 50 and numbers["avg_tokens"] == pytest.approx(22 / 3)


@pytest.mark.parametrize(
    ("column", "value"), [("n_tokens", "many"), ("n_tokens", -1), ("n_tokens", "inf"), ("n_tokens", True),
                          ("n_tokens", [3]), ("truncated", "maybe"), ("truncated", 2)],
)  # fmt: skip
def test_a_count_that_is_none_is_refused_before_anything_is_asked(tmp_path, column, value):
    path = write(tmp_path / "o.json", [*outputs("a"), outputs("b")[0] | {column: value}])
    with pytest.raises(UserError, match=rf"o\.json: row 1: expected .* under {column}, found"):
        load_outputs(path)


def test_outputs_without_text_are_refused(tmp_path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": None}]
    with pytest.raises(UserError, match=r"1 of 2 rows have no text under output \(rows 1"):
        load_outputs(write(tmp_path / "o.json", rows))


def test_a_pair_says_which_output_is_missing():
    gap = {"instruction": "b", "output": None}
    assert [p.missing for p in match_outputs([*outputs("a"), gap], outputs("a", "b"))] == ["", "no_output"]
    assert [p.missing for p in match_outputs(outputs("a", "b"), [*outputs("a"), gap])] == ["", "no_reference"]


def test_real_outputs_match_their_reference(shared_data):
    reference = load_outputs(shared_data / "alpaca_eval" / "reference_gpt4_1106_preview.json.gz")
    model = load_outputs(shared_data / "alpaca_eval" / "alpaca-7b" / "model_outputs.json.gz")
    pairs = match_outputs(model[::-1], reference)
    assert [p.instruction for p in pairs] == [row["instruction"] for row in reference]
    assert [p.output for p in pairs] == [row["output"] for row in model]
    assert len(pairs) == 805


@pytest.mark.parametrize("model", ["alpaca-7b", "claude-2.1", "gpt4_gamed"])
def test_published_annotations_are_both_outputs_of_each_prompt(shared_data, model):
    """They are what `model_outputs.json` and the file of the reference say."""
    folder = shared_data / "alpaca_eval"
    ours, theirs = (load_outputs(folder / model / "annotations.json.gz", reference=side) for side in (False, True))
    for found, file in ((ours, f"{model}/model_outputs.json.gz"), (theirs, "reference_gpt4_1106_preview.json.gz")):
        published = load_outputs(folder / file)
        assert [(r["instruction"], r["output"]) for r in found] == [(r["instruction"], r["output"]) for r in published]
    assert {row["generator"] for row in ours} == {model} and {r["generator"] for r in theirs} == {"gpt4_1106_preview"}
