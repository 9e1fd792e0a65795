"""Addresses of object storage, its errors in words, and one writer for a run that is kept there."""

from __future__ import annotations

import itertools
import json
import threading
import time
from pathlib import Path

import pytest
from support.command import free_port, otpo, refused
from support.training import settings

from otpo.errors import UserError, WorkError
from otpo.files import is_address, iter_rows
from pipeline.lock.holder import Holder
from pipeline.recipe import make_recipe
from pipeline.storage import claim as claims
from pipeline.storage import stored
from pipeline.storage.claim import CLAIM, claimed
from pipeline.storage.remote import check_address, open_remote
from pipeline.storage.stored import stored_run, working_folder


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """A cache of this test's own, and claims that settle at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(claims, "SETTLE_SECONDS", 0.0)


@pytest.mark.parametrize("path", ["runs", "/data/runs", "../runs", "./s3", "C", "a b", "s3", "s3/runs", "gs-x", "a:b"])
def test_a_path_is_no_address(path):
    assert not is_address(path)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://host/runs", "begins with s3:// or gs://"),
        ("hdfs://a/b", "begins with s3:// or gs://"),
        ("s3:/bucket/runs", "expected s3://BUCKET/FOLDER"),
        ("s3:///runs", "expected s3://BUCKET/FOLDER"),
        ("s3://bucket/../other", "expected s3://BUCKET/FOLDER"),
        ("s3://bucket/runs?region=x", "AWS_REGION"),
        ("s3:bucket/runs", "expected s3://BUCKET/FOLDER"),
        ("s3//bucket/runs", "expected s3://BUCKET/FOLDER"),
        (" s3://bucket/runs", "without spaces"),
        ("s3://bucket/runs ", "without spaces"),
        ("s3:\\\\bucket\\runs", "expected s3://BUCKET/FOLDER"),
        ("file:///data/runs", "begins with s3:// or gs://"),
        ("az://a/b", "begins with s3:// or gs://"),
    ],
)
def test_what_is_no_bucket_and_folder_is_refused(address, words):
    assert is_address(address)
    with pytest.raises(UserError, match="expected") as error:
        check_address(address)
    assert words in str(error.value) and address.split("?")[0].split("/")[0] in str(error.value)


def test_no_address_becomes_a_folder_here(tmp_path, monkeypatch):
    """Not as a run's place from Python, as any command's output, nor as what a recipe reads."""
    from typer.testing import CliRunner

    from jobs.cli import app
    from jobs.submission import prepare
    from pipeline.notebook import run_recipe

    monkeypatch.chdir(tmp_path)
    tree = settings(tmp_path, "a/b", methods={"dpo": {}})
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 3)
    there = set(tmp_path.iterdir())
    for runs in ("hdfs://host/runs", "s3:/bucket/runs", Path("s3://bucket/runs")):
        with pytest.raises(UserError, match=r"expected (a folder|s3://BUCKET)"):
            run_recipe(make_recipe(tree), runs=runs)
    for words in (
        ["fresh", "pairs.jsonl", "--out", "s3://bucket/model"],
        ["weights", "a/b", "pairs.jsonl", "--out", "gs://bucket/weights.html"],
        ["generate", "a/b", "--task", "pairs.jsonl", "--out", "az://bucket/out.json"],
        ["report", "board", "--out", "s3://bucket/page"],
        ["submit", "recipe.yaml", "--shared", "s3://bucket"],
    ):
        done = CliRunner().invoke(app, words)
        assert isinstance(done.exception, UserError) and "expected a " in str(done.exception), words
    for key in ("model.path", "data.path"):
        section, name = key.split(".")
        changed = tree | {section: tree[section] | {name: "s3://bucket/x"}}
        with pytest.raises(UserError, match=f"{key}: expected a path or a hub name, found the address 's3://bucket/x'"):
            run_recipe(make_recipe(changed), runs=tmp_path / "runs")
        with pytest.raises(UserError, match=f"{key}: expected a path or a hub name"):
            prepare(make_recipe(changed), runs="/shared/runs", shared=[], python="python", redo=False)
    with pytest.raises(UserError, match="that is an address"):
        list(iter_rows("s3://bucket/pairs.jsonl"))
    assert {path.name for path in set(tmp_path.iterdir()) - there} <= {"runs"}


def test_keys_in_an_address_are_refused_and_not_shown():
    with pytest.raises(UserError, match="environment variables") as error:
        check_address("s3://AKIAKEY:hidden@bucket/runs")
    assert "hidden" not in str(error.value) and "AKIAKEY" not in str(error.value)


def test_a_storage_that_does_not_answer_is_an_error_in_words(tmp_path, tiny_llama, monkeypatch):
    import yaml

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings(tmp_path, tiny_llama, methods={"dpo": {}})))
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "not-to-be-shown", "AWS_REGION": "us-east-1"}
    dead = f"http://127.0.0.1:{free_port()}"
    done = otpo(tmp_path, "train", "recipe.yaml", "--runs", "s3://b/runs", **keys, AWS_ENDPOINT_URL=dead)
    refused(done, "s3://b/runs/small", "cannot be read and written", "AWS_ENDPOINT_URL")
    assert done.seconds < 60 and "not-to-be-shown" not in done.err


def test_a_bucket_that_is_not_there(bucket):
    with pytest.raises(UserError, match="Check the bucket's name"), stored_run("s3://nobody/runs", "mine"):
        raise AssertionError("nothing is to be started")


def test_an_object_that_is_replaced_meanwhile_is_read_whole(bucket):
    remote, stop = open_remote(f"{bucket}/runs"), threading.Event()
    contents = [json.dumps({"files": ["x" * 100] * count}).encode() for count in (1, 400)]
    remote.write("list.json", contents[0])

    def replace() -> None:
        for number in itertools.count():
            if stop.is_set():
                return
            open_remote(f"{bucket}/runs").write("list.json", contents[number % 2])

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        found = {remote.read("list.json") for _ in range(100)}
    finally:
        stop.set()
        writer.join()
    assert found == set(contents)


def test_a_run_is_copied_when_it_ends_well_or_badly(bucket, tmp_path):
    address = f"{bucket}/runs/"
    with stored_run(address, "mine") as runs:
        assert runs == working_folder(f"{bucket}/runs")
        (runs / "mine").mkdir(parents=True)
        (runs / "mine" / "one").write_text("1")
    remote = open_remote(address).folder("mine")
    assert remote.read("one") == b"1" and CLAIM not in remote.objects()
    with pytest.raises(WorkError, match=r"^the training failed$"), stored_run(address, "mine") as runs:
        (runs / "mine" / "two").write_text("2")
        raise WorkError("the training failed")
    assert remote.read("two") == b"2" and CLAIM not in remote.objects()


def test_a_refused_run_leaves_nothing_there(bucket):
    with pytest.raises(UserError), stored_run(f"{bucket}/runs", "mine"):
        raise UserError("wrong input")
    assert open_remote(bucket).objects() == []


def test_it_is_copied_while_it_is_worked_on(bucket, monkeypatch):
    monkeypatch.setattr(stored, "COPY_SECONDS", 0.1)
    remote = open_remote(f"{bucket}/runs/mine")
    with stored_run(f"{bucket}/runs", "mine") as runs:
        (runs / "mine").mkdir(parents=True, exist_ok=True)
        (runs / "mine" / "metrics.jsonl").write_text("1\n")
        until = time.monotonic() + 30
        while remote.read("metrics.jsonl") is None:
            assert time.monotonic() < until
            time.sleep(0.05)


def test_caches_of_frozen_models_are_shared_by_the_runs_of_an_address(bucket, monkeypatch, tmp_path):
    with stored_run(f"{bucket}/runs", "one") as runs:
        (runs / "scorers" / "reference").mkdir(parents=True)
        (runs / "scorers" / "reference" / "part-1").write_text("log-probabilities")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    with stored_run(f"{bucket}/runs", "two") as runs:
        assert (runs / "scorers" / "reference" / "part-1").read_text() == "log-probabilities"


# ---- one writer ----


def test_a_second_writer_is_refused_while_the_first_lives(bucket):
    remote = open_remote(f"{bucket}/runs/mine")
    with claimed(remote):
        with pytest.raises(UserError, match=r"is being written by .*pid") as error, claimed(remote):
            raise AssertionError("there would be two writers")
        assert "--runs" in str(error.value)
    with claimed(remote):
        pass


def test_a_claim_of_a_dead_process_of_this_machine_is_taken_over_at_once(bucket):
    from dataclasses import asdict, replace

    remote = open_remote(f"{bucket}/runs/mine")
    dead = replace(Holder.here(), started="long ago", token="dead")
    remote.write(CLAIM, json.dumps({"count": 1, "holder": asdict(dead)}).encode())
    began = time.monotonic()
    with claimed(remote):
        assert time.monotonic() - began < 5


@pytest.mark.parametrize("lives", [True, False])
def test_a_claim_of_another_machine_is_watched(bucket, monkeypatch, lives):
    from dataclasses import asdict, replace

    monkeypatch.setattr(claims, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.1)
    remote = open_remote(f"{bucket}/runs/mine")
    other = asdict(replace(Holder.here(), machine="another", host="another", token="other"))
    ended = threading.Event()

    def beat() -> None:
        count = 1
        while not ended.is_set():
            remote.write(CLAIM, json.dumps({"count": count, "holder": other}).encode())
            count += lives
            ended.wait(0.3)

    remote.write(CLAIM, json.dumps({"count": 0, "holder": other}).encode())
    said = []
    holder = threading.Thread(target=beat)
    if lives:
        holder.start()
    try:
        if lives:
            with pytest.raises(UserError, match="host another"), claimed(remote):
                raise AssertionError("it lives")
        else:
            with claimed(remote, progress=lambda *call: said.append(call[-1])):
                assert "waiting up to 1 s for a sign of life" in said[0]
    finally:
        ended.set()
        if lives:
            holder.join()


def test_a_run_that_was_taken_over_stops(bucket, monkeypatch):
    monkeypatch.setattr(stored, "COPY_SECONDS", 0.1)
    remote = open_remote(f"{bucket}/runs/mine")
    with pytest.raises(WorkError, match="no longer holds it"), stored_run(f"{bucket}/runs", "mine") as runs:
        (runs / "mine").mkdir(parents=True, exist_ok=True)
        remote.write(CLAIM, b'{"count": 1, "holder": {}}')
        (runs / "mine" / "late").write_text("not to be copied over the other's")
        time.sleep(20)  # interrupted
    assert remote.read("late") is None
