"""Reading, recognising and reporting preference files."""

import gzip
import json
import math
import re
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from trl import extract_prompt

from otpo.data.convert import convert
from otpo.data.formats.reading import recognise
from otpo.data.load import load_rows
from otpo.errors import UserError

ROWS = [
    {"prompt": 'Say "hi", twice,\nplease.', "chosen": "hi, hi 😀", "rejected": "“no”"},
    {"prompt": "¿Qué hora es?", "chosen": "Son las tres; ya es tarde.", "rejected": "NA"},
    {"prompt": "line\u2028separator", "chosen": "谢谢", "rejected": "null"},
]


def write(folder: Path, name: str, rows: list[dict]) -> Path:
    kind = name.removesuffix(".gz")
    if kind.endswith(".json"):
        raw = json.dumps(rows, ensure_ascii=False).encode()
    elif kind.endswith(".jsonl"):
        raw = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    elif kind.endswith(".csv"):
        quoted = [",".join('"' + str(value).replace('"', '""') + '"' for value in row.values()) for row in rows]
        raw = "\r\n".join([",".join(rows[0]), *quoted]).encode()
    else:
        sink = pa.BufferOutputStream()
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), sink)
        raw = sink.getvalue().to_pybytes()
    path = folder / name
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return path


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind, gz):
    assert load_rows(write(tmp_path, "pairs" + kind + gz, ROWS)) == ROWS


def test_json_may_hold_data_or_lines_or_begin_with_a_byte_order_mark(tmp_path):
    wrapped, lines, marked = (tmp_path / name for name in ("a.json", "b.json", "c.json"))
    wrapped.write_text(json.dumps({"version": 1, "data": ROWS}))
    lines.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    marked.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())
    assert load_rows(wrapped) == load_rows(lines) == load_rows(marked) == ROWS


FRAME = pd.DataFrame(ROWS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("a.json", FRAME.to_json(orient=orient).encode()) for orient in ("columns", "index", "split", "table")),
        ("a.json", json.dumps(FRAME.to_dict("list")).encode()),
        ("a.json", json.dumps({"model": "m", "outputs": ROWS}, indent=1).encode()),
        ("a.jsonl", json.dumps(ROWS, indent=1).encode()),
        ("a.json", gzip.compress(json.dumps(ROWS).encode())),
        ("a.csv", gzip.compress(FRAME.to_csv(index=False).encode())),
        ("a.parquet", gzip.compress(FRAME.to_parquet())),
        ("a.json.gz", json.dumps(ROWS).encode()),
        *(("a.json", json.dumps(ROWS).encode(code)) for code in ("utf-16", "utf-16-le", "utf-16-be", "utf-32")),
        ("a.jsonl", "\n".join(map(json.dumps, ROWS)).encode("utf-16")),
        ("a.csv", FRAME.to_csv(index=False).encode("utf-16")),
        ("a.csv", FRAME.to_csv(index=False, sep=";").encode("utf-8-sig")),
        ("a.tsv", FRAME.to_csv(index=False, sep="\t").encode("utf-16")),
        ("a.csv", FRAME.to_csv(index=False, lineterminator="\r\n").encode()),
    ],
)
def test_the_forms_in_which_people_keep_a_table_are_the_same_rows(tmp_path, name, content):
    """Also with a cell that has a comma, a line end and a letter that is not ASCII."""
    (tmp_path / name).write_bytes(content)
    rows = load_rows(tmp_path / name)
    assert [{column: row[column] for column in ROWS[0]} for row in rows] == ROWS


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", b"prompt: hello", "not JSON"),
        ("a.json", b'{"rows": []}', r"an object with the keys rows"),
        ("a.json", b'{"a": [1, 2], "b": [1]}', "its columns differ in length: a 2, b 1"),
        ("a.json", b'{"columns": ["a", "a"], "data": [[1, 2]]}', "a name of its own for each cell"),
        ("a.json", b'{"one": [{"a": 1}], "two": [{"a": 2}]}', r"several lists \(one, two\)"),
        ("a.json", b'{"q1": {"a": 1}, "q2": {"a": 2}}', "keys q1, q2"),
        ("a.json", b"[" * 100_000, "cannot read"),
        ("a.json", b'[{"a": 1' + b"0" * 5000 + b"}]", "cannot read"),
        ("a.json", b"PAR1 as parquet begins\xff", "is a parquet file: name it .parquet"),
        (
            "a.csv",
            "prompt,chosen\n\u00fcber,a\n".encode("latin-1"),
            "iconv -f WINDOWS-1252 -t UTF-8 .*a.csv > converted.csv",
        ),
        ("a.json", b'[{"prompt": "a"}, "b"]', "row 1 is 'b'"),
        ("a.json", b"[]", "no rows"),
        ("a.json", b" \n", "is empty"),
        ("a.json", b'["\xff"]', "not UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": ', "line 2"),
        ("a.csv", b'prompt,chosen\n"a,b', "not CSV"),
        ("a.csv", b"prompt,chosen\na,b\na, and b,c\n", "line 3 has 3 cells, and the header 2 columns. Quote cells"),
        ("a.csv", b"prompt,chosen,chosen\na,b,c\n", "the header has the column 'chosen' twice"),
        ("a.jsonl", b'{"a": 1, "b": {"c": 1, "c": 2}}', "an object has the key 'c' twice"),
        ("a.json", b'[{"a": 1},\n {"b": 1, "b": 1}]', "an object has the key 'b' twice"),
        ("a.json", b'{"data": [{"b": 1}], "system": "Be brief."}', "system stands beside data"),
        ("a.json", b'{"data": [{"b": 1, "b": 1}]}', "an object has the key 'b' twice"),
        ("a.csv", b"prompt,chosen,rejected\n", "no rows"),
        ("a.parquet", b"PAR1 and no more", "not parquet"),
        ("a.json.gz", b"\x1f\x8b and no more", "cannot read"),
        ("a.json.gz", gzip.compress(b"[]")[:-4], "cannot read"),
        ("a.txt", b"hello", "by its name"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_one_clear_error(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        load_rows(tmp_path / name)


def test_commas_at_the_ends_of_lines_lose_nothing(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,,\na,b,,\nc,d,, ,\n")
    assert [(row["prompt"], row["chosen"]) for row in load_rows(tmp_path / "a.csv")] == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize("source", ["pairs.json", "./pairs", "/nowhere/pairs", "data/my/pairs", "pairs.jsonl.gz"])
def test_a_missing_file_is_not_looked_for_on_the_hub(source):
    with pytest.raises(UserError, match="found nothing there"):
        load_rows(source)


def test_a_name_that_is_neither_file_nor_hub_data_says_both(monkeypatch):
    import datasets

    # The hub client itself, told that there is no network.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"neither a file here .* nor a data set .* network"):
        load_rows("no-such-owner/no-such-data")


def test_a_folder_of_data_files_is_read_by_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, "train.jsonl", ROWS)
    assert load_rows(str(folder)) == ROWS
    with pytest.raises(UserError, match="split 'validation'"):
        load_rows(str(folder), split="validation")


def test_a_folder_of_some_files_is_refused_and_they_are_named(tmp_path):
    write(tmp_path, "pairs.jsonl", ROWS)
    write(tmp_path, "prompts.jsonl", ROWS)
    (tmp_path / "README.md").write_text("Mine.")
    with pytest.raises(UserError, match=r"is a folder.*name one of the files in it \(pairs\.jsonl, prompts\.jsonl\)"):
        load_rows(str(tmp_path))
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a folder.*save_to_disk"):
        load_rows(str(tmp_path / "saved"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is a folder.*holds no"):
        load_rows(str(tmp_path / "empty"))


USER = {"role": "user", "content": "Is it raining?"}
YES, NO = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."}


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c", "instruction": "a"}, "preference"),
        ({"instruction": "a", "input": "", "output": "x", "chosen": "b", "rejected": "c"}, "instruction"),
        ({"instruction": "a", "input": "", "output": ["b", "c"]}, "instruction-ranked"),
        ({"instruction": "a", "output": "b"}, "instruction-output"),
        ({"chosen": "a b", "rejected": "a c"}, "preference-implicit"),
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired"),
        ({"prompt": "a", "completion": "b"}, "prompt-completion"),
    ],
)
def test_formats_are_known_by_their_columns(row, name):
    assert recognise([row, row, {}]) == name


def test_unknown_columns_are_listed_with_the_known_formats():
    with pytest.raises(
        UserError,
        match=r"columns frage, gut, worse\. .*data\.columns: \{prompt: frage, chosen: gut, rejected: worse\}\."
        r" Known formats: .*; preference: prompt, chosen, rejected; ",
    ):
        recognise([{"frage": "a", "gut": "b", "worse": "c"}])


def parts(row):
    (example,), _ = convert([row])
    return example.prompt, *example.completions


def test_the_input_stands_after_a_blank_line():
    row = {"instruction": "Translate.", "input": "Haus", "output": "", "chosen": "house", "rejected": "mouse"}
    assert parts(row) == ("Translate.\n\nHaus", "house", "mouse")
    assert parts(row | {"input": ""})[0] == parts(row | {"input": None})[0] == "Translate."


def test_an_output_is_one_answer_or_two_the_better_first():
    row = {"instruction": "Translate.", "input": "Haus"}
    prompt = "Translate.\n\nHaus"
    assert parts(row | {"output": "house"}) == (prompt, "house")
    assert parts(row | {"output": ["house", "mouse"]}) == (prompt, "house", "mouse")
    rows = [row | {"output": output} for output in (["house", "mouse"], ["a"], ["a", "b", "c"], "ab", ["a", 1], None)]
    examples, report = convert(rows[:2])
    assert [e.row for e in examples] == [0] and report.format == "instruction-ranked"
    examples, report = convert([*rows, *rows[:1] * 3])
    assert report.problems == {"output is not a list of two strings": [1, 2, 3, 4, 5]}
    examples, report = convert([row | {"output": "house"}, row | {"output": None}, row | {"output": " "}], pairs=False)
    assert report.problems == {"no output": [1], "completion is empty": [2]} and len(examples) == 1


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("The sky is blue.", "The sky is green."),
        ("Human: Hello?\n\nAssistant: Hi there", "Human: Hello?\n\nAssistant: Good day"),
        ([USER, YES], [USER, NO]),
        ([USER, NO, USER, YES], [USER, NO, USER, NO]),
    ],
)
def test_the_implicit_prompt_is_trls(chosen, rejected):
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert parts({"chosen": chosen, "rejected": rejected}) == (theirs["prompt"], theirs["chosen"], theirs["rejected"])


def test_the_implicit_prompt_never_ends_inside_a_word():
    assert parts({"chosen": "It is green", "rejected": "It is grey"}) == ("It is", " green", " grey")
    assert parts({"chosen": "Q: so? A: yes", "rejected": "Q: so? A: yes, but"}) == ("Q: so? A:", " yes", " yes, but")
    assert parts({"chosen": "Eine Übung", "rejected": "Eine Übel"}) == ("Eine", " Übung", " Übel")


def test_a_prompt_that_the_conversations_repeat_is_not_doubled():
    system = {"role": "system", "content": "Be brief."}
    row = {"prompt": "Is it raining?", "chosen": [system, USER, YES], "rejected": [system, USER, NO]}
    assert parts(row) == ([system, USER], [YES], [NO])
    assert parts({"prompt": "Is it raining?", "chosen": [YES], "rejected": [NO]}) == ([USER], [YES], [NO])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b"}, "no rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "no rejected"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "rejected is neither a string nor a list of messages"),
        ({"prompt": "a", "chosen": " \n", "rejected": "b"}, "chosen is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "identical completions"),
        ({"prompt": [USER], "chosen": [YES], "rejected": "Yes."}, "identical completions"),
        ({"prompt": [USER], "chosen": [YES, USER, YES], "rejected": [NO]}, "chosen is more than one message"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [NO]}, "chosen is not the assistant's"),
        ({"prompt": [{"content": "a"}], "chosen": [YES], "rejected": [NO]}, "prompt has a message without a role"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": [YES], "rejected": [NO]},
            "prompt has a message with a part that is not text (image): only text can be trained on",
        ),
    ],
)
def test_a_row_that_cannot_be_used_is_counted_under_its_reason(row, reason):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    examples, report = convert([good, row, good])
    assert [example.row for example in examples] == [0, 2]
    assert report.problems == {reason: [1]}
    assert (report.n_rows, report.n_usable) == (3, 2)
    with pytest.raises(UserError, match=re.escape(f"none of the 2 rows can be used: 2 {reason}")):
        convert([{column: row.get(column) for column in good}] * 2)


def test_labels_are_read_as_csv_writes_them():
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, "True", "0", "false", 1, "maybe")]
    examples, report = convert(rows)
    assert [example.label for example in examples] == [True, True, False, False, True]
    assert report.problems == {"label is neither true nor false": [5]}


def test_single_completions_are_no_pairs_but_pairs_give_completions():
    with pytest.raises(UserError, match=r"expected preference pairs .* found the format 'prompt-completion'"):
        convert([{"prompt": "a", "completion": "b"}], pairs=True)
    rows = [{"prompt": "a", "chosen": "b", "rejected": "b"}]
    examples, report = convert(rows, pairs=False)
    assert examples[0].completions == ("b",)
    assert "the chosen completions are taken" in report.why


def test_the_report_counts_lengths_and_duplicates():
    rows = [
        {"prompt": "p" * 10, "chosen": "long answer", "rejected": "short"},
        {"prompt": "p" * 10, "chosen": "brief", "rejected": "rambling on"},
        {"prompt": "q" * 30, "chosen": "abc", "rejected": "xyz"},
        {"prompt": "p" * 10, "chosen": "long answer", "rejected": "short"},
        {"prompt": "r" * 50, "chosen": "same", "rejected": "same"},
    ]
    _, report = convert(rows, "pairs.json")
    assert report.notes == {"duplicate prompt": [1, 3], "duplicate row": [3]}
    assert report.longer == {"characters": {"chosen": 2, "rejected": 1, "equal": 1}}
    assert math.isclose(report.chosen_longer(), 2 / 3)
    assert report.lengths["prompt characters"] == {"mean": 15.0, "median": 10.0, "p95": 27.0, "max": 30}
    written = json.loads(json.dumps(report.to_dict()))
    assert written["problems"] == {"identical completions": {"count": 1, "first_rows": [4]}}
    text = "\n".join(report.lines())
    assert "usable 4" in text and "1 identical completions (rows 4)" in text and "(66.7 %)" in text


def test_the_real_file(shared_data):
    path = shared_data / "preferences" / "instruction-data-with-preference.json"
    rows = load_rows(path)
    examples, report = convert(rows, path)
    assert report.format == "instruction" and report.n_rows == 1100
    identical = [number for number, row in enumerate(rows) if row["chosen"] == row["rejected"]]
    assert report.problems == {"identical completions": identical} and len(identical) == 6
    assert report.n_usable == len(examples) == 1094
    kept = [row for row in rows if row["chosen"] != row["rejected"]]
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in kept)
    equal = sum(len(row["chosen"]) == len(row["rejected"]) for row in kept)
    assert report.longer["characters"] == {"chosen": longer, "rejected": len(kept) - longer - equal, "equal": equal}
    assert (longer, equal) == (564, 12)
