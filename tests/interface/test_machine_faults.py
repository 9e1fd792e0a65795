"""A fault of the machine is told in words by whichever verb meets it."""

from __future__ import annotations

import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest
from support.command import otpo

from jobs.machine_faults import outside_fault


def full() -> None:
    with open("/dev/full", "w") as file:
        file.write("x" * 100_000)


def wrapped() -> None:
    try:
        full()
    except OSError as error:
        raise RuntimeError("the writer failed") from error


def long_name() -> None:
    Path("x" * 300).touch()


def store_that_is_full() -> None:
    with closing(sqlite3.connect(":memory:")) as store:
        store.execute("PRAGMA max_page_count=1")
        store.execute("CREATE TABLE replies (text)")


@pytest.mark.parametrize(
    ("fails", "words"),
    [
        (full, ["No space left on device", "free some space"]),
        (wrapped, ["No space left on device"]),
        (long_name, ["File name too long", "xxx"]),
        (store_that_is_full, ["judge's replies", "full"]),
    ],
)
def test_a_fault_of_the_machine_has_words_and_a_remedy(fails, words):
    with pytest.raises(Exception) as caught:
        fails()
    told = outside_fault(caught.value)
    assert told is not None and told.endswith("the same command goes on.")
    for word in words:
        assert word in told


def test_a_copy_that_fails_names_its_reason(tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(shutil.Error) as caught:
        shutil.copytree(tmp_path / "from", tmp_path / "to")
    assert "No such file or directory" in (outside_fault(caught.value) or "")


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file"), ValueError("x"), sqlite3.OperationalError("?")]
)
def test_any_other_error_is_a_fault_of_ours(error):
    assert outside_fault(error) is None


@pytest.mark.skipif(sys.platform != "linux", reason="needs tmpfs")
def test_a_verb_on_a_full_disk_ends_in_one_sentence(tmp_path, small_disk):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text('{"prompt": "a b c", "chosen": "d e f", "rejected": "g h i"}\n' * 20)
    done = otpo(tmp_path, "fresh", rows, "--out", small_disk("64k") / "model")
    assert done.code == 1, done.err
    assert "No space left on device" in done.err and "Traceback" not in done.err
