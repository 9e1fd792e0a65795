"""`judge.reference` as a file: read as `otpo judge` reads outputs."""

from __future__ import annotations

import json

import pytest

from otpo.errors import UserError
from pipeline.progress import silent
from pipeline.recipe import make_recipe
from pipeline.run.context import RunContext
from pipeline.run.engines import Engines
from pipeline.run.folder import RunFolder
from pipeline.run.judges import reference_rows
from pipeline.run.manifest import Manifest
from pipeline.run.sources import Sources

ASKED = ["Name a river.\nOnly one.", "2 + 2?"]


def context(folder, rows, said=None, **judge):
    """A run that is not begun, whose reference is a file of these rows."""
    (folder / "prompts.json").write_text(json.dumps([{"instruction": text} for text in ASKED]))
    (folder / "reference.json").write_text(json.dumps(rows))
    recipe = make_recipe(
        {
            "name": "mine",
            "model": {"path": "m"},
            "data": {"path": "pairs.jsonl"},
            "methods": {"dpo": {}},
            "generate": {"tasks": {"mine": str(folder / "prompts.json")}},
            "judge": {"url": "http://j/v1", "model": "j", "reference": str(folder / "reference.json"), **judge},
        }
    )
    place = RunFolder(folder / "run")
    sources = Sources(recipe, place, silent)
    progress = silent if said is None else lambda what, done, total, text: said.append(text)
    return RunContext(recipe, place, Manifest(place.path), sources, Engines(recipe, sources), progress, None)


def read(run, **how):
    return reference_rows(run, run.sources.tasks["mine"], **how)


def test_a_reference_file_has_the_spelling_of_the_prompts_and_its_mapping_is_said(tmp_path):
    rows = [{"question": f"{text} \r\n", "antwort": str(n), "model": "ab"[n]} for n, text in enumerate(ASKED)]
    said: list[str] = []
    found = read(context(tmp_path, rows, said, columns={"output": "antwort"}), say=True)
    assert [(row["instruction"], row["output"], row["generator"]) for row in found] == [
        (ASKED[0], "0", "reference"),
        (ASKED[1], "1", "reference"),
    ]
    assert said == [
        "output is the column antwort, instruction is the column question, generator is the column model",
        "outputs of 2 generators are the reference, which is called reference",
    ]


@pytest.mark.parametrize(
    ("row", "judge", "words"),
    [
        (
            {"antwort": "no word to tell"},
            {},
            r"reference\.json: no column is the output.*judge\.columns: {output: antwort}",
        ),
        ({"output": "a"}, {"columns": {"output": "antwort"}}, "judge.columns: no file has a column antwort; there are"),
        ({"output": None}, {}, "2 x null.* judge.count_missing counts them"),
    ],
)
def test_a_reference_file_that_cannot_be_read_names_the_key(tmp_path, row, judge, words):
    with pytest.raises(UserError, match=words):
        read(context(tmp_path, [{"instruction": text, **row} for text in ASKED], **judge))


def test_gaps_of_a_reference_are_kept_where_that_is_allowed(tmp_path):
    rows = [{"instruction": ASKED[0], "output": None}, {"instruction": ASKED[1], "output": "4"}]
    assert [row["output"] for row in read(context(tmp_path, rows, count_missing=True))] == [None, "4"]
