"""`otpo submit` against a real cluster of its own: token authentication, one job a recipe, log and exit code."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from support.command import free_port
from support.servers import ScriptedJudge
from support.training import losses

from eval.judge.protocols.registry import find_protocol
from jobs.command_submission import prepare_command
from jobs.submission import prepare, size, stage
from jobs.submit import connect
from otpo.errors import UserError
from pipeline.recipe import load_recipe, make_recipe

TOKEN = "a-token-of-the-test-" + "x" * 24
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Head:
    address: str
    env: dict[str, str]

    def submit(self, *words: str, env: dict[str, str] | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess:
        return self.otpo("submit", *words, env=env, cwd=cwd)

    def otpo(self, *words: str, env: dict[str, str] | None = None, cwd: Path = ROOT) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "jobs.cli", words[0], "--address", self.address, *words[1:]]
        env = {**(self.env if env is None else env), "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=540)

    def ray(self, *words: str) -> str:
        command = [str(Path(sys.executable).parent / "ray"), *words, "--address", self.address]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=120, check=True).stdout


def bare_environment() -> dict[str, str]:
    """Without what would lead to another cluster, and with a home that holds no token."""
    dropped = ("RAY_", "OTPO_")
    return {key: value for key, value in os.environ.items() if not key.startswith(dropped)}


@contextmanager
def a_head(cpus: int, nodes: Sequence[dict[str, int]] = ()) -> Iterator[Head]:
    """`ray start --head` with token authentication, on ports and in a folder of its own.

    Args:
        cpus: of the head.
        nodes: resources of further nodes, each with a raylet of its own.
    """
    # sockets have short names: the session's folder must not lie deep
    folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/otpo-rayXXXX"], text=True).strip())
    port, gcs = free_port(), free_port()
    env = bare_environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    common = {"num-gpus": 0, "object-store-memory": 200_000_000}
    ports = {"port": gcs, "dashboard-port": port, "dashboard-agent-listen-port": free_port(),
             "ray-client-server-port": free_port(), "node-manager-port": 0, "object-manager-port": 0,
             "temp-dir": folder}  # fmt: skip
    ray = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
    processes = []

    def start(words: list[str], options: dict[str, Any]) -> None:
        with (folder / f"start{len(processes)}.log").open("w") as log:
            command = [*ray, *words, *(f"--{key}={value}" for key, value in options.items())]
            processes.append(
                subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            )

    start(["--head"], common | ports | {"num-cpus": cpus})
    for _ in range(240):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert processes[0].poll() is None, (folder / "start0.log").read_text()
        time.sleep(0.5)
    for resources in nodes:
        custom = {kind: amount for kind, amount in resources.items() if kind != "CPU"}
        start([], common | {"address": f"127.0.0.1:{gcs}", "num-cpus": resources["CPU"],
                            "dashboard-agent-listen-port": free_port(), "resources": json.dumps(custom)})  # fmt: skip
    yield Head(f"http://127.0.0.1:{port}", env)
    for process in reversed(processes):
        process.send_signal(signal.SIGTERM)
    try:
        for process in processes:
            process.wait(timeout=60)
    finally:
        subprocess.run(["rm", "-rf", str(folder)])


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A cluster of one node."""
    with a_head(2) as started:
        yield started


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> Path:
    rows = [{"prompt": f"{n} + {n} = ", "chosen": f"{2 * n}", "rejected": f"{2 * n + 1}, or"} for n in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree: dict[str, Any] = {
        "name": "tiny",
        "model": {"path": str(tiny_llama)},
        "data": {"path": str(tmp_path / "pairs.jsonl"), "max_length": 64, "validation": 0},
        "methods": {"dpo": {}},
        "train": {"max_steps": 2, "global_batch_size": 4, "workers": 1, "use_gpu": False, "dtype": "fp32"},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "tiny.yaml"


def test_local_files_travel_unless_every_node_sees_them(recipe: Path, tiny_llama: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe)
    sent = prepare(loaded, runs="/net/runs", shared=[tiny_llama], python="python", redo=False)
    assert sent.recipe.model.path == str(tiny_llama)
    ((place, source),) = sent.inputs.items()
    assert sent.recipe.data.path == place and source == tmp_path / "pairs.jsonl" and not Path(place).is_absolute()
    assert sent.entrypoint == "python -m jobs.cli run recipe.yaml --runs /net/runs"

    stage(sent.job, tmp_path / "staging")
    assert load_recipe(tmp_path / "staging" / "recipe.yaml") == sent.recipe
    assert (tmp_path / "staging" / place).read_text() == source.read_text()
    listed = {path.name for path in (tmp_path / "staging").iterdir()}
    assert listed == {"otpo", "eval", "pipeline", "jobs", "recipe.yaml", "inputs"}
    assert not list((tmp_path / "staging").rglob("__pycache__"))


def test_all_files_of_a_model_travel_and_nothing_else_of_its_folder(recipe: Path, tiny_llama: Path, tmp_path: Path):
    """As of a cloned model whose `.gitignore` leaves the weights to another tool."""
    model = tmp_path / "cloned"
    shutil.copytree(tiny_llama, model)
    (model / ".gitignore").write_text("*.safetensors\n")
    (model / ".git").mkdir()
    (model / ".git" / "objects").write_text("x" * 1000)
    (model / "dangling").symlink_to("nowhere")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(model / "socket"))
        sent = prepare(load_recipe(recipe, [f"model.path={model}"]), runs="/net", shared=[], python="p", redo=False)
        stage(sent.job, tmp_path / "staging")
    placed = tmp_path / "staging" / next(place for place in sent.inputs if place.endswith("cloned"))
    assert {path.name for path in placed.iterdir()} == {path.name for path in tiny_llama.iterdir()}
    assert size(model) == size(tiny_llama)


def test_what_a_recipe_names_beside_data_and_models_travels_too(
    recipe: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A protocol of one's own with its template, a certificate, frozen models, and what regimes of a study change."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dpo").mkdir()  # a folder named as a label is not meant
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own.yaml").write_text("{name: own, like: preference, template: text/own.txt}")
    (tmp_path / "mine" / "text").mkdir()
    (tmp_path / "mine" / "text" / "own.txt").write_text("{instruction} {output_1} {output_2}: m or M?")
    (tmp_path / "ca.pem").write_text("certificates")
    (tmp_path / "hard.jsonl").write_text((tmp_path / "pairs.jsonl").read_text())
    tree = yaml.safe_load(recipe.read_text())
    tree["methods"] = {"dpo": {}, "tgdpo": {"oracle": str(tiny_llama)}, "other": {"method": "tgdpo", "oracle": "dpo"}}
    tree["judge"] = {"url": "https://host/v1", "model": "m", "protocol": "mine/own.yaml", "ca_file": "ca.pem"}
    tree["study"] = {"regimes": {"hard": {"data.path": "hard.jsonl"}, "plain": {"data": {"max_length": 32}}}}
    sent = prepare(make_recipe(tree), runs="/net", shared=[], python="python", redo=False, verb="study")
    stage(sent.job, tmp_path / "staging")
    monkeypatch.chdir(tmp_path / "staging")
    there = load_recipe("recipe.yaml")
    assert find_protocol(there.judge.protocol).text == (tmp_path / "mine" / "text" / "own.txt").read_text()
    assert Path(str(there.judge.ca_file)).read_text() == "certificates"
    assert there.method("tgdpo").frozen_models == {"oracle": there.model.path}
    assert there.method("other").frozen_models == {"oracle": "dpo"}
    assert Path(there.study.regimes["hard"]["data.path"]).read_text() == (tmp_path / "pairs.jsonl").read_text()
    assert there.study.regimes["plain"] == {"data": {"max_length": 32}}

    (tmp_path / "mine" / "text" / "own.txt").write_text("{instruction} {output_1} {output_2}: m, or M?")
    monkeypatch.chdir(tmp_path)
    again = prepare(make_recipe(tree), runs="/net", shared=[], python="python", redo=False, verb="study")
    assert again.id != sent.id, "another template asks another question"
    (tmp_path / "mine" / "own.yaml").write_text("{name: own, like: preference, template: ../own.txt}")
    with pytest.raises(UserError, match=r"own\.yaml: its template .*does not travel: move it there"):
        prepare(make_recipe(tree), runs="/net", shared=[], python="python", redo=False)
    with pytest.raises(UserError, match=r"judge\.protocol: there is no file"):
        prepare(load_recipe(recipe, ["judge.protocol=none.yaml"]), runs="/net", shared=[], python="python", redo=False)


def test_a_job_may_train_or_sweep_alone(recipe: Path) -> None:
    verbs = ["run", "train", "sweep", "study"]
    found = {
        verb: prepare(load_recipe(recipe), runs="/net", shared=[], python="python", redo=False, verb=verb)
        for verb in verbs
    }
    assert [sent.entrypoint.split()[3] for sent in found.values()] == verbs
    assert len({sent.id for sent in found.values()}) == 4
    with pytest.raises(UserError, match="--verb judge: expected one of run, train, sweep, study"):
        prepare(load_recipe(recipe), runs="/net", shared=[], python="python", redo=False, verb="judge")


def test_the_id_is_made_of_content(recipe: Path, tmp_path: Path) -> None:
    def name(*overrides: str, runs: str = "/net/runs") -> str:
        return prepare(load_recipe(recipe, overrides), runs=runs, shared=[], python="python", redo=False).id

    first = name()
    assert first.startswith("tiny-") and name() == first
    assert len({first, name("train.seed=1"), name(runs="/net/other")}) == 3
    (tmp_path / "pairs.jsonl").write_text((tmp_path / "pairs.jsonl").read_text() + '{"prompt": "a", "chosen": "b"}\n')
    assert name() != first


def test_missing_files_and_wrong_addresses_are_refused(recipe: Path) -> None:
    loaded = make_recipe(yaml.safe_load(recipe.read_text()) | {"data": {"path": "there_is_no_such.jsonl"}})
    with pytest.raises(UserError, match=r"data\.path: there is no file"):
        prepare(loaded, runs="/net/runs", shared=[], python="python", redo=False)
    with pytest.raises(UserError, match="expected the dashboard's address"):
        connect("127.0.0.1")
    with pytest.raises(UserError, match="Nothing answers"):
        connect(f"http://127.0.0.1:{free_port()}")


@pytest.mark.slow
def test_a_job_trains_once_and_wrong_tokens_are_refused(head: Head, recipe: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    refused = head.submit(str(recipe), env=head.env | {"RAY_AUTH_TOKEN": "wrong" * 9})
    assert refused.returncode == 2 and "RAY_AUTH_TOKEN" in refused.stderr and not runs.exists()
    missing = head.submit(str(recipe), env=bare_environment() | {"RAY_AUTH_MODE": "disabled"})
    assert missing.returncode == 2 and "RAY_AUTH_MODE=token" in missing.stderr

    key = "sk-not-to-be-seen"
    secretive = head.env | {"OPENAI_API_KEY": key}
    first = head.submit(str(recipe), "--runs", str(runs), "--follow", env=secretive)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "Report:" in first.stdout, "the job's log is shown"
    model = runs / "tiny" / "models" / "dpo" / "model" / "model.safetensors"
    written = model.stat().st_mtime_ns

    second = head.submit(str(recipe), "--runs", str(runs), "--follow", env=secretive)
    assert second.returncode == 0 and "has run already" in second.stderr
    assert model.stat().st_mtime_ns == written

    jobs = subprocess.check_output(
        [str(Path(sys.executable).parent / "ray"), "job", "list", "--address", head.address], env=head.env, text=True
    )
    assert jobs.count("submission_id='tiny-") == 1 and key not in jobs and TOKEN not in jobs

    listed = head.otpo("jobs", "list")
    assert listed.returncode == 0 and "SUCCEEDED  exit code 0" in listed.stdout and str(runs) in listed.stdout
    job = next(word for word in listed.stdout.split() if word.startswith("tiny-"))
    assert "Report:" in head.otpo("jobs", "logs", job).stdout
    unknown = head.otpo("jobs", "status", "tiny-unknown")
    assert unknown.returncode == 2 and job in unknown.stderr


@pytest.mark.slow
def test_a_judge_and_a_report_are_jobs_too(head: Head, tmp_path: Path) -> None:
    """Their files travel, wrong flags are refused before, and what is there is not made again."""
    (tmp_path / "here").mkdir()
    for name, letter in (("ours", "a"), ("theirs", "b")):
        rows = [{"instruction": f"{n}?", "output": letter * (n + 1), "generator": name} for n in range(6)]
        (tmp_path / "here" / f"{name}.json").write_text(json.dumps(rows))
    board, page = tmp_path / "board", tmp_path / "page"
    with ScriptedJudge() as server:
        words = ["ours.json", "--reference=theirs.json", "--judge-url", server.url, "--judge-model", "m"]
        words += ["--out", str(board)]
        wrong = head.submit("--verb", "judge", "--", *words, "--no-such-flag", cwd=tmp_path / "here")
        assert wrong.returncode == 2 and "--no-such-flag" in wrong.stderr and not board.exists()
        asked = head.submit("--verb", "judge", "--follow", "--", *words, cwd=tmp_path / "here")
        assert asked.returncode == 0 and "win rate" in asked.stdout, asked.stdout + asked.stderr
        calls = len(server.calls)
        again = head.submit("--verb", "judge", "--follow", "--", *words, cwd=tmp_path / "here")
        assert again.returncode == 0 and "has run already" in again.stderr and len(server.calls) == calls
    assert (board / "leaderboard.csv").is_file()
    done = head.submit("--verb", "report", "--follow", "--", str(board), "--out", str(page), cwd=tmp_path)
    assert done.returncode == 0 and (page / "report.html").is_file(), done.stdout + done.stderr
    listed = head.otpo("jobs", "list").stdout
    assert f"results in {board}" in listed and f"results in {page}" in listed


@pytest.mark.slow
def test_files_of_a_command_travel_to_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.json", "c.json"):
        (tmp_path / name).write_text(name)
    words = ["a.json", "--reference=b.json", "--name", "x", f"mine={tmp_path}/c.json", "--out", "/net/board"]
    job = prepare_command("judge", words, {"out": Path("/net/board")}, shared=[], python="python", here=False)
    there = dict.fromkeys(shlex.split(job.entrypoint)[4:])
    assert sorted(path.name for path in job.inputs.values()) == ["a.json", "b.json", "c.json"]
    assert all(place in job.entrypoint for place in job.inputs) and str(tmp_path) not in job.entrypoint
    assert "x" in there and "/net/board" in there and job.results == "/net/board"
    stage(job, tmp_path / "staging")
    assert {place: (tmp_path / "staging" / place).read_text() for place in job.inputs} == {
        place: path.name for place, path in job.inputs.items()
    }
    (tmp_path / "a.json").write_text("changed")
    other = prepare_command("judge", words, {"out": Path("/net/board")}, shared=[], python="python", here=False)
    assert other.id != job.id
    with pytest.raises(UserError, match="absolute path"):
        prepare_command("judge", words, {"out": Path("board")}, shared=[], python="python", here=False)


def test_a_kept_leaderboard_is_written_where_it_lies_and_its_judges_key_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "add").mkdir()  # no file of the command, although it has a word's name
    (tmp_path / "ours.json").write_text("[]")
    words, values = ["/net/board", "mine=ours.json"], {"folder": Path("/net/board"), "judge_url": None}
    job = prepare_command("board add", words, values, shared=[], python="python", here=False)
    assert shlex.split(job.entrypoint)[:6] == ["python", "-m", "jobs.cli", "board", "add", "/net/board"]
    assert list(job.inputs.values()) == [tmp_path / "ours.json"]
    assert job.results == "/net/board" and job.id.startswith("board-add-board-") and job.judge_key is None
    with pytest.raises(UserError, match="DIR board: on a cluster it must be an absolute path"):
        prepare_command("board add", words, {"folder": Path("board")}, shared=[], python="python", here=False)
    reference = {"name": "r", "file": "r.json", "sha256": "0", "prompts": 1}
    judge = {"url": "http://127.0.0.1:1/v1", "model": "m", "api_key_env": "MY_KEY"}
    state = {"task": "t", "judge": judge, "protocol": "preference", "reference": reference}
    (tmp_path / "board").mkdir()
    (tmp_path / "board" / "board.yaml").write_text(yaml.safe_dump(state))
    values = {"folder": tmp_path / "board", "judge_url": None}
    keys = {
        verb: prepare_command(verb, [str(tmp_path / "board")], values, shared=[], python="p", here=True).judge_key
        for verb in ("board update", "board build")
    }
    assert keys == {"board update": "MY_KEY", "board build": None}


@pytest.mark.slow
def test_a_leaderboard_is_kept_by_jobs_which_run_each_time(head: Head, tmp_path: Path) -> None:
    for name in ("ours", "theirs"):
        rows = [{"instruction": f"{n}?", "output": name * (n + 1), "generator": name} for n in range(6)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    board = tmp_path / "board"
    with ScriptedJudge() as server:
        words = ["init", str(board), "--reference", "theirs.json", "--judge-url", server.url, "--judge-model", "m"]
        unknown = head.submit("--verb", "board", "--", "keep", str(board), cwd=tmp_path)
        assert unknown.returncode == 2 and "expected one of init, add" in unknown.stderr
        for told in (words, ["add", str(board), "ours.json"], ["update", str(board)], ["update", str(board)]):
            done = head.submit("--verb", "board", "--follow", "--", *told, cwd=tmp_path)
            assert done.returncode == 0 and "SUCCEEDED" in done.stderr, done.stdout + done.stderr
    listed = head.otpo("jobs", "list").stdout
    assert listed.count("board-update-board-") == 2 and f"results in {board}" in listed


@pytest.mark.slow
def test_a_failed_job_gives_exit_code_1_and_a_new_attempt(head: Head, recipe: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    broken = ("train.learning_rate=1e12", "train.max_steps=6", "train.max_failures=0")
    words = (str(recipe), *broken, "--runs", str(runs), "--follow")
    first = head.submit(*words)
    assert first.returncode == 1 and "xpected finite numbers" in first.stdout
    second = head.submit(*words)
    assert second.returncode == 1 and "-attempt2" in second.stderr


@pytest.mark.slow
def test_the_jobs_own_exit_code_comes_back_and_deleted_results_are_made_again(
    head: Head, recipe: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    words = ("--verb", "train", "--runs", str(runs), "--follow")
    wrong = head.submit(str(recipe), "data.path=/nowhere/there_is_none.jsonl", *words)
    assert wrong.returncode == 2, wrong.stdout + wrong.stderr
    first = head.submit(str(recipe), *words)
    assert first.returncode == 0 and (runs / "tiny" / "models" / "dpo" / "model").is_dir(), first.stderr
    assert "has run already" in head.submit(str(recipe), *words).stderr
    shutil.rmtree(runs / "tiny")
    again = head.submit(str(recipe), *words)
    assert "-attempt2" in again.stderr and (runs / "tiny" / "models" / "dpo" / "model").is_dir()
    redone = [head.submit(str(recipe), "--redo", *words).stderr for _ in range(2)]
    assert "attempt2" not in redone[0] and "attempt2" in redone[1]


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_running(head: Head, recipe: Path, tmp_path: Path) -> None:
    words = [str(recipe), "train.max_steps=400", "--runs", str(tmp_path / "runs"), "--address", head.address]
    command = [sys.executable, "-m", "jobs.cli", "submit", *words]
    follower = subprocess.Popen(
        [*command, "--follow"], env=head.env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert follower.stdout is not None
    while "Running entrypoint" not in follower.stdout.readline():
        assert follower.poll() is None
    follower.send_signal(signal.SIGINT)
    _, told = follower.communicate(timeout=60)
    assert follower.returncode == 1 and "The job goes on" in told and "--follow" in told
    again = head.submit(*words[:-2])
    assert "is there already: RUNNING" in again.stderr
    job = next(word for word in again.stderr.split() if word.startswith("tiny-"))
    assert head.otpo("jobs", "stop", job).returncode == 0


RAYS_OWN = {"_AutoscalingCoordinatorActor", "_StatsActor", "PlacementGroupCleaner"}
"""Detached actors of Ray Data and Ray Train, without CPUs; a killed driver's cleaner may stay with the cluster."""


def drivers_of(runs: Path) -> list[psutil.Process]:
    """The processes of a job's command: not those of `otpo submit`, which names the same folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            words = process.cmdline()
            if str(runs) in words and "submit" not in words and "-m" in words:
                found.append(process)
    return found


@pytest.mark.slow
def test_a_driver_that_is_killed_at_six_moments_costs_nothing(recipe: Path, tmp_path: Path) -> None:
    """On a head without CPUs and pools of nodes: the same board, the same losses, no verdict asked for twice."""
    concurrency = 2
    tree = yaml.safe_load(recipe.read_text())
    prompts = [json.dumps({"instruction": f"{n} + {n} = "}) for n in range(24)]
    (tmp_path / "sums.jsonl").write_text("\n".join(prompts))
    tree["train"] |= {"max_steps": 60, "save_every": 5, "learning_rate": 1e-2}  # outputs that differ are asked about
    tree["generate"] = {"tasks": {"sums": str(tmp_path / "sums.jsonl")}, "backend": "transformers", "max_tokens": 8}

    def reply(call: Any) -> None:
        time.sleep(0.2)

    with ScriptedJudge(reply) as judge, a_head(0, [{"CPU": 2, "train": 2}, {"CPU": 1, "generate": 1}]) as head:
        tree["judge"] = {"url": judge.url, "model": "test", "concurrency": concurrency, "reference": "base"}
        tree["judge"] |= {"both_orders": True}
        recipe.write_text(yaml.safe_dump(tree))
        whole = head.submit(str(recipe), "--runs", str(tmp_path / "whole"), "--follow")
        assert whole.returncode == 0, whole.stdout + whole.stderr
        asked = len(judge.calls)
        runs = tmp_path / "killed"
        command = [sys.executable, "-m", "jobs.cli", "submit", str(recipe), "--runs", str(runs), "--follow"]
        steps = runs / "tiny" / "models" / "dpo" / "metrics.jsonl"
        draw = random.Random(5)
        moments: list[Callable[[], bool]] = [lambda: True]
        for step in sorted(draw.sample(range(1, 60), 3)):
            moments.append(lambda step=step: steps.exists() and steps.read_text().count("\n") >= step)
        for call in sorted(draw.sample(range(5, asked), 2)):
            moments.append(lambda call=call: len(judge.calls) - asked >= call)
        for reached in moments:
            submitted = subprocess.Popen(
                [*command, "--address", head.address],
                env={**head.env, "PYTHONPATH": str(ROOT)}, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            while not (drivers_of(runs) and reached()):
                assert submitted.poll() is None, submitted.communicate()[0]
                time.sleep(0.05)
            for driver in drivers_of(runs):
                with suppress(psutil.NoSuchProcess):
                    driver.kill()
            submitted.communicate(timeout=120)
            assert submitted.returncode in (1, 137)
        last = head.submit(str(recipe), "--runs", str(runs), "--follow")
        assert last.returncode == 0, last.stdout + last.stderr
        assert len(judge.calls) - asked <= asked + concurrency * len(moments)
        whole_run, run = tmp_path / "whole" / "tiny", runs / "tiny"
        assert losses(run / "models" / "dpo") == pytest.approx(losses(whole_run / "models" / "dpo"), abs=1e-6)
        assert (run / "leaderboard.csv").read_bytes() == (whole_run / "leaderboard.csv").read_bytes()
        assert not drivers_of(runs)
        assert "CREATED" not in head.ray("list", "placement-groups", "--filter", "state=CREATED")
        actors = head.ray("list", "actors", "--filter", "state=ALIVE")
        assert set(re.findall(r"^ *\d+  [0-9a-f]{32}  (\w+)", actors, re.MULTILINE)) <= RAYS_OWN, actors
