"""A folder and its copy on a real S3 server: equal after each copy, and never wrong in between."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import pytest

from pipeline.storage.copying import LIST, Copying, fetch_missing, send_missing
from pipeline.storage.remote import Remote, open_remote


class PowerCut(Exception):
    pass


class Cut(Remote):
    """The same folder, until the machine dies after `left` more changes."""

    def __init__(self, remote: Remote, left: int):
        super().__init__(remote.address, remote._files, remote._root)
        self.left = left

    def _change(self) -> None:
        if self.left == 0:
            raise PowerCut
        self.left -= 1

    def write(self, path, content):
        self._change()
        super().write(path, content)

    def upload(self, file, path):
        self._change()
        super().upload(file, path)

    def delete(self, path):
        self._change()
        super().delete(path)


def content(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in sorted(folder.rglob("*")) if f.is_file()}


def fill(folder: Path, files: dict[str, str]) -> None:
    """Make a folder's content exactly this."""
    for old in [f for f in folder.rglob("*") if f.is_file()]:
        old.unlink()
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def remote(bucket) -> Remote:
    return open_remote(f"{bucket}/runs/mine")


def machine(remote: Remote, folder: Path) -> Copying:
    return Copying(remote, folder / "mine", folder / "mine.copied.json")


FIRST = {
    "manifest.json": "a",
    "events.jsonl": "1\n",
    "models/x/out.json": "made by a",
    "models/x/model/weights": "made by a",
    "models/x/checkpoints/step-000002/complete.json": "{}",
    "models/x/checkpoints/step-000002/.metadata": "a",
}
SECOND = {
    "manifest.json": "b",
    "events.jsonl": "1\n2\n",
    "models/x/out.json": "made by b",
    "models/x/model/weights": "made by a",
    "models/x/new.json": "made by b",
    "models/x/checkpoints/step-000004/complete.json": "{}",
    "models/x/checkpoints/step-000004/.metadata": "b",
}


def test_another_machine_gets_what_was_copied(remote, tmp_path):
    here, there = machine(remote, tmp_path / "one"), machine(remote, tmp_path / "two")
    fill(here.local, FIRST)
    assert here.fetch() == 0 and here.send() == len(FIRST)
    assert here.send() == 0, "nothing has changed"
    assert there.fetch() == len(FIRST) and content(there.local) == FIRST
    assert there.send() == 0 and there.fetch() == 0

    fill(there.local, SECOND)
    assert there.send() > 0
    assert here.fetch() == len(SECOND) and content(here.local) == SECOND, "what was deleted there is gone here too"


def test_one_changed_file_is_one_file_sent(remote, tmp_path):
    here = machine(remote, tmp_path)
    fill(here.local, FIRST)
    here.send()
    (here.local / "models/x/out.json").write_text("longer than before")
    assert here.send() == 1
    assert remote.read("models/x/out.json") == b"longer than before"
    (here.local / "events.jsonl").unlink()
    assert here.send() == 1
    assert "events.jsonl" not in remote.objects()


def test_what_is_unfinished_or_of_this_machine_alone_stays(remote, tmp_path):
    here = machine(remote, tmp_path)
    own = [
        "writer-1.lock", "ray/x/state.json", ".out.json.77.partial", "models/x/model.partial/weights",
        "models/x/checkpoints/step-000006/.metadata", "judge/store.sqlite-wal", "scorers/.part",
    ]  # fmt: skip
    fill(here.local, FIRST | dict.fromkeys(own, ""))
    here.send()
    assert set(remote.objects()) - {LIST} == set(FIRST)


@pytest.mark.parametrize("changes", range(12))
def test_a_machine_that_dies_leaves_nothing_wrong(remote, tmp_path, changes):
    """After any number of changes: whoever goes on has no file of one state beside a manifest that was written for
    another, and the machine itself, back again, still has all of its work.
    """
    here = machine(remote, tmp_path / "one")
    fill(here.local, FIRST)
    here.send()
    fill(here.local, SECOND)
    with suppress(PowerCut):
        machine(Cut(remote, changes), tmp_path / "one").send()

    other = machine(remote, tmp_path / "two")
    other.fetch()
    found = content(other.local)
    assert found.pop("events.jsonl") in ("1\n", "1\n2\n")
    manifest = found.pop("manifest.json")
    assert manifest in ("a", "b")
    for path, text in found.items():
        known = {"a": FIRST, "b": SECOND}
        assert text in (FIRST.get(path), SECOND.get(path))
        if path == "models/x/out.json":  # the one file that both states have with another content
            assert known[manifest][path] == text
    checkpoints = {Path(path).parent.name for path in found if "checkpoints" in path}
    assert checkpoints, "the older checkpoint goes once the newer one is listed"
    for name in checkpoints:
        assert {f"models/x/checkpoints/{name}/{file}" for file in ("complete.json", ".metadata")} <= found.keys()

    back = machine(remote, tmp_path / "one")
    assert back.fetch() == 0 and content(back.local) == SECOND
    back.send()
    last = machine(remote, tmp_path / "three")
    last.fetch()
    assert content(last.local) == SECOND
    assert set(remote.objects()) - {LIST} == set(SECOND)


def test_the_twelve_deaths_cover_a_whole_copy(remote, tmp_path):
    here = machine(remote, tmp_path / "one")
    fill(here.local, FIRST)
    here.send()
    fill(here.local, SECOND)
    cut = Cut(remote, 100)
    machine(cut, tmp_path / "one").send()
    assert 8 <= 100 - cut.left <= 11


@pytest.mark.parametrize("changes", range(8))
def test_a_first_copy_that_dies_is_gone_on_with(remote, tmp_path, changes):
    fill(tmp_path / "one" / "mine", FIRST)
    with suppress(PowerCut):
        machine(Cut(remote, changes), tmp_path / "one").send()
    other = machine(remote, tmp_path / "two")
    assert other.fetch() in (0, len(FIRST))
    back = machine(remote, tmp_path / "one")
    assert back.fetch() == 0
    back.send()
    assert content(back.local) == FIRST and set(remote.objects()) - {LIST} == set(FIRST)


def test_replies_that_sqlite_has_not_merged_are_copied(remote, tmp_path):
    """New rows lie in a file beside the database, whose own time and size stay as they are."""
    here = machine(remote, tmp_path / "one")
    here.local.mkdir(parents=True)
    path = here.local / "store.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as store:
        store.execute("PRAGMA journal_mode = WAL")
        store.execute("CREATE TABLE replies (text)")
        here.send()
        before = os.stat(path)
        store.execute("INSERT INTO replies VALUES ('paid for')")
        assert os.stat(path).st_mtime_ns == before.st_mtime_ns, "else this test shows nothing"
        assert here.send() == 1
        there = machine(remote, tmp_path / "two")
        there.fetch()
    with closing(sqlite3.connect(there.local / "store.sqlite")) as copy:
        assert copy.execute("SELECT text FROM replies").fetchall() == [("paid for",)]


def test_a_cut_object_is_left_out(remote, tmp_path):
    here = machine(remote, tmp_path / "one")
    fill(here.local, FIRST)
    here.send()
    remote.write("models/x/model/weights", b"made")
    there = machine(remote, tmp_path / "two")
    assert there.fetch() == len(FIRST) - 1
    assert not (there.local / "models/x/model/weights").exists()


def test_an_emptied_bucket_is_filled_again(remote, tmp_path):
    here = machine(remote, tmp_path)
    fill(here.local, FIRST)
    here.send()
    for path in remote.objects():
        remote.delete(path)
    again = machine(remote, tmp_path)
    assert again.fetch() == 0 and content(again.local) == FIRST
    assert again.send() == len(FIRST)
    assert set(remote.objects()) - {LIST} == set(FIRST)


def test_a_folder_that_was_copied_by_other_means_is_fetched(remote, tmp_path):
    for path, text in FIRST.items():
        remote.write(path, text.encode())
    here = machine(remote, tmp_path)
    assert here.fetch() == len(FIRST) and content(here.local) == FIRST
    assert here.send() == 0
    assert json.loads(remote.read(LIST))["files"].keys() == FIRST.keys()


def test_caches_are_added_to_from_both_sides(remote, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    fill(one, {"a/part-1": "1", "a/.part-2": "unfinished"})
    fill(two, {"a/part-3": "3"})
    send_missing(remote, one, set())
    fetch_missing(remote, two)
    send_missing(remote, two, set(remote.objects()))
    fetch_missing(remote, one)
    assert content(two) == {"a/part-1": "1", "a/part-3": "3"}
    assert content(one) == content(two) | {"a/.part-2": "unfinished"}
