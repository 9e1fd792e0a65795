"""Rows are read as they are asked for: the same rows as at once, in memory that does not grow with the file."""

from __future__ import annotations

import csv
import gzip
import itertools
import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from jobs.cli import app
from otpo import files
from otpo.data import convert as conversion
from otpo.data.convert import convert, read_examples
from otpo.data.load import open_rows
from otpo.errors import UserError
from otpo.files import iter_rows, read_rows

ROWS = [{"prompt": f"Q{i} \u2028 é", "chosen": "a" * (i % 7), "rejected": f"b{i}"} for i in range(50)]
VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=3), min_size=1, max_size=9),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    block=st.sampled_from([1, 2, 5, 64]),
)
def test_a_json_list_is_the_same_in_blocks(tmp_path_factory, rows, indent, ascii_only, block):
    path = tmp_path_factory.mktemp("json") / "rows.json"
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    path.write_text(f" {text}\n ", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "BLOCK", block)
        patch.setattr(files, "_json_whole", lambda path: pytest.fail("read whole"))
        assert list(iter_rows(path)) == rows


@pytest.mark.parametrize("text", ['[{"a": 1},]', '[{"a": 1} {"a": 2}]', '[{"a": 1}', '[{"a": 1}] x', '[{"a": tru}]'])
def test_a_broken_json_list_is_refused_in_blocks_too(tmp_path, text, monkeypatch):
    monkeypatch.setattr(files, "BLOCK", 4)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match="is not JSON"):
        read_rows(tmp_path / "a.json")


def broken(folder, kind):
    """A file whose first rows are sound and whose end is not."""
    path = folder / f"rows{kind}"
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if ".csv" in kind:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
            file.write('"unfinished')
    elif kind == ".json":
        path.write_text(json.dumps(ROWS)[:-9])
    else:
        raw = (lines * 999 + "{no json\n").encode()
        path.write_bytes(gzip.compress(raw) if kind.endswith(".gz") else raw)
    return path


@pytest.mark.parametrize("kind", [".json", ".jsonl", ".jsonl.gz", ".csv"])
def test_the_end_of_a_file_is_not_read_for_its_first_rows(tmp_path, kind):
    path = broken(tmp_path, kind)
    assert list(itertools.islice(iter_rows(path), 40)) == ROWS[:40]
    assert list(open_rows(path, limit=40)) == ROWS[:40]
    with pytest.raises(UserError, match=r"not (JSON|CSV)"):
        read_rows(path)


def test_rows_can_be_read_again(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    rows = open_rows(tmp_path / "rows.json")
    assert list(rows) == list(rows) == ROWS and rows.count() == 50
    assert open_rows(tmp_path / "rows.json", limit=7).count() == 7


def test_examples_come_one_by_one_and_the_report_is_that_of_all_at_once(tmp_path):
    rows = [*ROWS, {**ROWS[3], "rejected": "c"}, ROWS[4], {"prompt": "only"}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    examples, report = read_examples(open_rows(path), path)
    first = next(examples)
    assert (report.n_rows, report.n_usable) == (first.row + 1, 1)
    found = [first, *examples]
    assert (found, report) == convert(rows, path)
    assert report.n_rows == 53 and report.notes == {"duplicate prompt": [50, 51], "duplicate row": [51]}
    assert report.problems == {"chosen is empty": list(range(0, 50, 7)), "no chosen": [52]}


def test_the_first_rows_tell_the_format(monkeypatch):
    monkeypatch.setattr(conversion, "RECOGNISED", 2)
    _, report = convert([*ROWS[1:3], *({"prompt": "a", "completion": "b"} for _ in range(9))])
    assert report.format == "preference" and report.problems == {"no chosen": list(range(2, 11))}


def test_the_command_says_what_is_in_several_files_or_in_a_recipes_data_sets(tmp_path, tiny_llama):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "kto.json").write_text(json.dumps([{"frage": f"{i}", "completion": "b", "label": 1} for i in range(9)]))
    paths = [str(tmp_path / name) for name in ("rows.json", "kto.json")]
    done = CliRunner().invoke(app, ["data", paths[0], paths[0], "--model", str(tiny_llama)])
    assert done.exit_code == 0 and done.output.count("rows      50, usable 42") == 2
    assert done.output.count("example   prompt") == 2
    mix = {"a": {"path": paths[0], "limit": 20}, "b": {"path": paths[1], "columns": {"prompt": "frage"}}}
    recipe = {"name": "mix", "model": {"path": str(tiny_llama)}, "data": {"datasets": mix, "template": "literal"}}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(recipe))
    done = CliRunner().invoke(app, ["data", str(tmp_path / "mix.yaml")])
    assert done.exit_code == 0 and "rows      20, usable 17" in done.output and "labels    9 true" in done.output
    assert done.output.count("template  literal: as asked for") == 2
