"""Names of models and tasks as folders: any name, each its own folder, and those of earlier versions are found."""

import json
import unicodedata
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.html_page import assert_sound
from test_report import outputs_of, verdicts

from eval.board import report
from eval.board.leaderboard import leaderboard, write_leaderboard
from eval.board.run_files import read_run, write_outputs
from eval.layout import folder_name, outputs_file, reference_file

AWKWARD = [
    "通义千问", "文心一言", "..", ".", "", "a/b", "a-b", "a b", "A-B", "NA", "na", "x" * 1000, "x" * 999, "-rf", "~",
    "con", ".hidden", "é", unicodedata.normalize("NFD", "é"), "null", "model\x00", "\ud83d", "a/b-c14cddc033f6",
    folder_name("a/b"),
]  # fmt: skip


def test_awkward_names_have_folders_of_their_own():
    folders = [folder_name(name) for name in AWKWARD]
    assert len({folder.lower() for folder in folders}) == len(AWKWARD)
    for folder in folders:
        assert folder == Path(folder).name and folder not in ("", ".", "..") and len(folder) <= 100
        assert folder.isascii() and folder[0].isalnum()


@given(st.text(max_size=30), st.text(max_size=30))
def test_two_names_never_share_a_folder(one, other):
    assert (folder_name(one).lower() == folder_name(other).lower()) == (one == other)
    assert folder_name(one) == folder_name(one)


def test_plain_names_stay_as_they_are():
    for name in ("alpaca_eval", "otpo", "gpt4_1106_preview", "claude-2.1"):
        assert folder_name(name) == name


def test_every_model_of_a_board_keeps_its_outputs_and_its_task(tmp_path):
    tasks, names = ("任务一", "任务二"), ["通义千问", "文心一言", "..", "a/b", "a-b", "NA", "na", "x" * 1000]
    boards, frames = [], []
    for task in tasks:
        outputs = {name: outputs_of(name, 3, task, f"word {number} of {task}") for number, name in enumerate(names)}
        reference = outputs_of("base", 3, task, f"base of {task}")
        frame = verdicts(outputs, reference, dict.fromkeys(names, 0.6), task)
        write_outputs(tmp_path / "run", task, outputs, reference)
        boards.append(leaderboard(frame, outputs, reference, judge="j", protocol="p"))
        frames.append(frame)
        write_leaderboard(pd.concat(boards), tmp_path / "run" / "leaderboard.csv")
        run = read_run(tmp_path / "run")
        assert run.outputs[folder_name(task)] == outputs and run.references[folder_name(task)] == reference
    pd.concat(frames, ignore_index=True).to_parquet(tmp_path / "run" / "verdicts.parquet")
    assert_sound(report.build([tmp_path / "run"], tmp_path / "run"))
    text = "".join(path.read_text() for path in (tmp_path / "run").glob("*.html"))
    assert all(f"word {number} of {task} 1. " in text for number in range(len(names)) for task in tasks)
    assert {path.parent for path in tmp_path.iterdir()} == {tmp_path}  # nothing outside


@pytest.mark.parametrize("folder", ["My-Task", "My Task"])
def test_folders_of_earlier_versions_are_found(tmp_path, folder):
    """`otpo judge` put dashes for odd characters, and a run took a task's name as it is."""
    run, task = tmp_path / "run", "My Task"
    outputs, reference = {"Org/Model": outputs_of("Org/Model", 3, task, "old")}, outputs_of("base", 3, task, "base")
    for path, rows in {f"models/Org-Model/{folder}/model_outputs.json": outputs["Org/Model"],
                       f"judge/{folder}/reference.json": reference}.items():  # fmt: skip
        (run / path).parent.mkdir(parents=True)
        (run / path).write_text(json.dumps(rows))
    frame = verdicts(outputs, reference, {"Org/Model": 0.6}, task)
    frame.to_parquet(run / f"judge/{folder}/verdicts.parquet")
    write_leaderboard(leaderboard(frame, outputs, reference, judge="j", protocol="p"), run / "leaderboard.csv")
    words = assert_sound(report.build([run], run)).words()
    assert "old 1." in words and "base 1." in words
    newer = [{**row, "output": "new"} for row in outputs["Org/Model"]]
    write_outputs(run, task, {"Org/Model": newer}, reference)
    words = assert_sound(report.build([run], run)).words()
    assert "new" in words and "old 1." not in words


def test_a_run_goes_on_in_the_folder_that_it_has(tmp_path):
    assert (
        outputs_file(tmp_path, "dpo", "Mine")
        == tmp_path / "models" / "dpo" / folder_name("Mine") / "model_outputs.json"
    )
    (tmp_path / "models" / "dpo" / "Mine").mkdir(parents=True)
    (tmp_path / "judge" / "Mine").mkdir(parents=True)
    assert outputs_file(tmp_path, "dpo", "Mine").parent == tmp_path / "models" / "dpo" / "Mine"
    assert reference_file(tmp_path, "Mine").parent == tmp_path / "judge" / "Mine"
    assert reference_file(tmp_path, "../Mine").resolve().is_relative_to(tmp_path.resolve() / "judge")
