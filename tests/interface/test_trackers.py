"""Trackers: what they hold is what the run's files hold, each step once, whatever dies in between."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Trackio reads it when it is imported.
STORE = os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio")
os.environ["WANDB_MODE"] = "offline"

import psutil
import pytest
import yaml
from support.tracked import (
    Curves,
    mlflow_client,
    of_mlflow,
    of_tensorboard,
    of_trackio,
    of_wandb,
    tensorboard_text,
)
from support.training import settings
from transformers.integrations.integration_utils import rewrite_logs

from eval.board.leaderboard import read_leaderboard
from otpo.errors import UserError
from otpo.files import write_atomically
from pipeline.recipe import identity, make_recipe
from pipeline.run.folder import RunFolder
from pipeline.tracking.mirror import settings_of, tracker_names, tracking
from pipeline.tracking.trackers import PACKAGES, TRACKERS, check_trackers

ROOT = Path(__file__).resolve().parents[2]
SECRET = "5ecret" * 7  # as long as a key of W&B


def command(*arguments: str) -> list[Any]:
    """Arguments for subprocess: the command `otpo` with these arguments."""
    return [sys.executable, "-m", "jobs.cli", *arguments]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_API_KEY": SECRET, **more}


def held(folder: Path, project: str, label: str, known: Path) -> dict[str, Curves]:
    """Tracker -> what it holds of a label."""
    runs = json.loads(known.read_text())
    assert runs.keys() == TRACKERS.keys()
    return {
        "tensorboard": of_tensorboard(folder, label),
        "mlflow": of_mlflow(folder, runs["mlflow"]["run"]),
        "wandb": of_wandb(folder, runs["wandb"]["run"])[0],
        "trackio": of_trackio(project, label),
    }


def curves_of(file: Path) -> Curves:
    """What a metrics.jsonl holds, under the trackers' names."""
    found: Curves = {}
    for line in map(json.loads, file.read_text().splitlines()):
        for name, value in tracker_names(line).items():
            found.setdefault(name, []).append((line["step"], value))
    return found


def same(found: Curves, expected: Curves, **tolerance: float) -> None:
    """Every metric, every step once and in order, every value."""
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        values = [value for _, value in found[name]]
        assert values == pytest.approx([value for _, value in points], nan_ok=True, **tolerance), name


# ---- names and refusals ----


def test_names_are_those_of_trl_users():
    line = {"loss": 0.5, "rewards/chosen": 1.0, "eval_loss": 0.7, "eval_rewards/margins": 2, "learning_rate": 1e-6}
    assert tracker_names({"step": 3, **line}) == rewrite_logs(line)
    assert tracker_names({"step": 3, "loss": math.nan, "why": "text"}).keys() == {"train/loss"}


@pytest.mark.parametrize(
    ("written", "names"),
    [("tensorboard", ["tensorboard"]), (["mlflow", "wandb"], ["mlflow", "wandb"]), ("none", []), (None, [])],
)
def test_a_recipe_names_one_several_or_none(tmp_path, tiny_llama, written, names):
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {}})
    recipe = make_recipe(tree | {"tracking": written})
    assert recipe.tracking == names
    assert identity(recipe) == identity(make_recipe(tree)), "the same run"
    with pytest.raises(UserError, match=r"tracking\.0: .*'tensorboard', 'wandb', 'mlflow' or 'trackio'.*'tensorbord'"):
        make_recipe(tree | {"tracking": "tensorbord"})


def test_a_tracker_that_is_not_installed_is_refused_before_anything_starts(tmp_path, tiny_llama):
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {}}, tracking=["tensorboard", "mlflow", "trackio"])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    # None is how Python itself marks a module that must not be imported
    code = "import sys; sys.modules['mlflow'] = sys.modules['trackio'] = None; from jobs.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "recipe.yaml"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    said = " ".join(done.stderr.split())
    assert "not installed here: mlflow, trackio." in said and "pip install mlflow-skinny trackio" in said
    assert not (tmp_path / "runs").exists()


def test_wandb_without_a_key_is_refused(tmp_path):
    code = "from pipeline.tracking.trackers import check_trackers; check_trackers(['wandb'])"
    clean = {k: v for k, v in environment(HOME=str(tmp_path)).items() if not k.startswith(("WANDB", "NETRC"))}

    def check(**more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code], env=clean | more, capture_output=True, text=True)

    refused = check()
    assert "UserError" in refused.stderr and "WANDB_MODE=offline" in refused.stderr
    assert check(WANDB_MODE="offline").returncode == check(WANDB_API_KEY=SECRET).returncode == 0


def test_every_tracker_has_a_package():
    assert PACKAGES.keys() == TRACKERS.keys()
    check_trackers(TRACKERS)


# ---- the files of a run, written by hand ----


def lines(first: int, last: int, *, off: float = 0.0) -> str:
    """Metrics of the steps; every fifth is evaluated. `off` tells one training from another."""
    found = []
    for step in range(first, last + 1):
        found.append({"step": step, "loss": 1 / step + off, "rewards/chosen": float(step)})
        if step % 5 == 0:
            found.append({"step": step, "eval_loss": 2 / step + off})
    return "".join(json.dumps(line) + "\n" for line in found)


def write(file: Path, text: str) -> None:
    """Append as training does."""
    with file.open("a") as opened:
        opened.write(text)


def until(condition, seconds: float = 120) -> None:
    """Wait for it."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s"
        time.sleep(0.1)


def test_steps_that_are_done_again_are_in_each_tracker_once(tmp_path, tiny_llama):
    """A worker dies (its lines after the checkpoint are forgotten), then the driver; a third call finishes."""
    recipe = make_recipe(
        settings(tmp_path, tiny_llama, methods={"dpo": {}}, tracking=list(TRACKERS)) | {"name": "by-hand"}
    )
    folder, notes = RunFolder(tmp_path / "run"), list[str]()
    label = folder.label("dpo")
    label.path.mkdir(parents=True)
    with tracking(recipe, folder, note=notes.append):
        write_atomically(label.metrics, "")
        write(label.metrics, lines(1, 12) + '{"step": 13, "lo')
        until(lambda: label.tracking.exists() and len(json.loads(label.tracking.read_text())) == 4)
        write_atomically(label.metrics, lines(1, 10))
        write(label.metrics, lines(11, 13))
    runs = json.loads(label.tracking.read_text())
    for found in held(folder.tracking, "by-hand", "dpo", label.tracking).values():
        same(found, curves_of(label.metrics), rel=1e-6)
    with tracking(recipe, folder, note=notes.append):
        write_atomically(label.metrics, lines(1, 10))
        write(label.metrics, lines(11, 20))
        label.model.mkdir()
    assert not notes
    again = json.loads(label.tracking.read_text())
    assert {name: run["run"] for name, run in again.items()} == {name: run["run"] for name, run in runs.items()}
    for found in held(folder.tracking, "by-hand", "dpo", label.tracking).values():
        same(found, curves_of(label.metrics), rel=1e-6)
    status = mlflow_client(folder.tracking).get_run(again["mlflow"]["run"]).info.status
    assert status == "FINISHED"

    files = {file: file.stat().st_mtime_ns for file in folder.path.rglob("*") if file.is_file()}
    with tracking(recipe, folder, note=notes.append):
        pass
    assert files == {file: file.stat().st_mtime_ns for file in folder.path.rglob("*") if file.is_file()}


def test_a_training_that_is_done_again_is_another_run(tmp_path, tiny_llama):
    """As after --redo: the label's folder is thrown away while the run goes on."""
    names = ["tensorboard", "mlflow"]
    recipe = make_recipe(settings(tmp_path, tiny_llama, methods={"dpo": {}}, tracking=names))
    folder = RunFolder(tmp_path / "run")
    label = folder.label("dpo")
    label.model.mkdir(parents=True)
    write_atomically(label.metrics, lines(1, 5))
    with tracking(recipe, folder, note=pytest.fail):
        pass
    first = json.loads(label.tracking.read_text())["mlflow"]["run"]
    with tracking(recipe, folder, note=pytest.fail):
        for file in (label.metrics, label.tracking):
            file.unlink()
        label.model.rmdir()
        write_atomically(label.metrics, lines(1, 3, off=1))
        time.sleep(2.5)
        write(label.metrics, lines(4, 7, off=1))
        label.model.mkdir()
    second = json.loads(label.tracking.read_text())["mlflow"]["run"]
    assert second != first
    assert [step for step, _ in of_mlflow(folder.tracking, first)["train/loss"]] == [1, 2, 3, 4, 5]
    for found in (of_mlflow(folder.tracking, second), of_tensorboard(folder.tracking, "dpo")):
        same(found, curves_of(label.metrics), rel=1e-6)


def test_a_tracker_that_fails_stops_nothing(tmp_path, tiny_llama, monkeypatch):
    """An MLflow server that is not there."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    recipe = make_recipe(
        settings(tmp_path, tiny_llama, methods={"dpo": {}, "otpo": {}}, tracking=["mlflow", "tensorboard"])
    )
    folder, notes = RunFolder(tmp_path / "run"), list[str]()
    for label in ("dpo", "otpo"):
        folder.label(label).model.mkdir(parents=True)
        write_atomically(folder.label(label).metrics, lines(1, 5))
    with tracking(recipe, folder, note=notes.append):
        pass
    [note] = notes
    assert note.startswith("tracking: mlflow failed") and "127.0.0.1" in note
    for label in ("dpo", "otpo"):
        same(of_tensorboard(folder.tracking, label), curves_of(folder.label(label).metrics), rel=1e-6)
        assert json.loads(folder.label(label).tracking.read_text()).keys() == {"tensorboard"}


def test_what_is_shown_of_a_label_has_its_settings_and_no_judge(tmp_path, tiny_llama):
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {"beta": 0.3, "learning_rate": 2e-5}})
    recipe = make_recipe(tree | {"judge": {"url": "http://user:pass@host/v1", "model": "x"}})
    shown = settings_of(recipe, "dpo")
    assert shown["method"]["beta"] == 0.3 and shown["train"]["learning_rate"] == 2e-5
    assert "pass" not in json.dumps(shown)


# ---- real runs ----


@pytest.fixture(scope="module")
def judged(tmp_path_factory, tiny_llama) -> RunFolder:
    """A run of the command: trained, evaluated, judged by its own reward model, followed by every tracker."""
    folder = tmp_path_factory.mktemp("judged")
    (folder / "prompts.json").write_text(json.dumps([{"instruction": f"Question {i}: The capital?"} for i in range(6)]))
    tree = settings(
        folder,
        tiny_llama,
        methods={"dpo": {}, "rm": {"method": "reward-model"}},
        train={"eval_every": 5, "max_steps": 12},
        generate={"tasks": ["prompts.json"], "backend": "transformers", "max_tokens": 8},
        judge={"reward_model": "rm"},
        tracking=list(TRACKERS),
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree | {"name": "judged"}))
    subprocess.run(command("run", "recipe.yaml"), cwd=folder, env=environment(), check=True)
    return RunFolder(folder / "runs" / "judged")


@pytest.mark.slow
@pytest.mark.parametrize("label", ["dpo", "rm"])
def test_every_tracker_holds_the_training(judged, label):
    expected = curves_of(judged.label(label).metrics)
    assert [step for step, _ in expected["train/loss"]] == list(range(1, 13))
    assert [step for step, _ in expected["eval/loss"]] == [5, 10, 12]
    assert {"train/learning_rate", "train/grad_norm", "train/rewards/margins"} <= expected.keys()
    for found in held(judged.tracking, "judged", label, judged.label(label).tracking).values():
        same(found, expected, rel=1e-6)


@pytest.mark.slow
def test_trackers_show_the_settings(judged):
    runs = json.loads(judged.label("dpo").tracking.read_text())
    run = mlflow_client(judged.tracking).get_run(runs["mlflow"]["run"])
    assert run.info.status == "FINISHED" and run.info.run_name == "dpo"
    assert run.data.params["train.learning_rate"] == "0.001" and run.data.params["method.method"] == "dpo"
    assert of_wandb(judged.tracking, runs["wandb"]["run"])[1]["train"]["learning_rate"] == 0.001
    assert '"learning_rate": 0.001' in tensorboard_text(judged.tracking, "dpo", "config")


@pytest.mark.slow
def test_every_tracker_holds_the_leaderboard(judged):
    [row] = read_leaderboard(judged.leaderboard).to_dict("records")
    names = ("win_rate", "length_adjusted_winrate", "avg_length", "length_ratio")
    expected = {f"board/prompts/dpo/{name}": row[name] for name in names if math.isfinite(row[name])}
    assert len(expected) >= 3
    known = judged.tracking / "leaderboard.json"
    found = held(judged.tracking, "judged", "all models", known)
    for curves in found.values():
        figures = {name: points for name, points in curves.items() if name.startswith("board/")}
        same(figures, {name: [(0, value)] for name, value in expected.items()}, rel=1e-5)
    assert found["trackio"]["leaderboard"] and found["wandb"]["leaderboard"], "the tables"
    assert "|dpo|" in tensorboard_text(judged.tracking, "all models", "leaderboard")
    run = json.loads(known.read_text())["mlflow"]["run"]
    client = mlflow_client(judged.tracking)
    path = client.download_artifacts(run, "leaderboard.csv")
    assert read_leaderboard(Path(path)).equals(read_leaderboard(judged.leaderboard))


@pytest.mark.slow
def test_no_key_is_written(judged):
    for file in [*judged.path.rglob("*"), *Path(STORE).rglob("*")]:
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_a_tracker_named_later_gets_the_run_and_nothing_is_done_again(judged):
    """The board too. `tracking` is no part of what makes the run that run."""
    before = judged.manifest.read_text()
    folder = judged.path.parents[1]
    arguments = ("run", "recipe.yaml", "name=judged", "tracking=[tensorboard]")
    for file in judged.path.glob("models/*/tracking.json"):
        file.unlink()
    (judged.tracking / "leaderboard.json").unlink()
    done = subprocess.run(
        command(*arguments), cwd=folder, env=environment(), check=True, capture_output=True, text=True
    )
    assert (
        "Nothing to do" in done.stdout
        and json.loads(judged.manifest.read_text())["stages"] == json.loads(before)["stages"]
    )
    for label in ("dpo", "rm"):
        same(of_tensorboard(judged.tracking, label), curves_of(judged.label(label).metrics), rel=1e-6)
    assert "board/prompts/dpo/win_rate" in of_tensorboard(judged.tracking, "all models")


@pytest.mark.slow
def test_each_trial_of_a_sweep_is_a_run(tmp_path, tiny_llama):
    tree = settings(
        tmp_path,
        tiny_llama,
        methods={"dpo": {}},
        train={"eval_every": 3, "max_steps": 6, "workers": 1},
        sweep={"params": {"methods.dpo.beta": [0.1, 0.5]}, "metric": "eval_loss"},
        tracking=["tensorboard", "mlflow"],
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    subprocess.run(command("sweep", "recipe.yaml"), cwd=tmp_path, env=environment(), check=True)
    sweep = RunFolder(tmp_path / "runs" / "small").sweep
    client, tried = mlflow_client(sweep.tracking), set()
    for trial in sweep.trials():
        expected, run = curves_of(trial.metrics), json.loads(trial.tracking.read_text())["mlflow"]["run"]
        assert [step for step, _ in expected["eval/loss"]] == [3, 6]
        for found in (of_tensorboard(sweep.tracking, trial.path.name), of_mlflow(sweep.tracking, run)):
            same(found, expected, rel=1e-6)
        tried.add(client.get_run(run).data.params["trial.methods.dpo.beta"])
    assert tried == {"0.1", "0.5"}


@contextmanager
def driving(folder: Path):
    """`otpo train` in a process; whatever comes of it has ended in the end."""
    with (folder / "log.txt").open("ab") as log:
        process = psutil.Popen(
            command("train", "recipe.yaml"),
            cwd=folder, stdout=log, stderr=log, env=environment(), start_new_session=True,
        )  # fmt: skip
    family = {process}

    def look() -> set[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            family.update(process.children(recursive=True))
        return family

    try:
        yield process, look
    finally:
        look()
        if process.is_running():
            process.send_signal(signal.SIGKILL)
        process.wait()
        for each in psutil.wait_procs(family, timeout=90)[1]:
            with suppress(psutil.NoSuchProcess):
                each.kill()


@pytest.mark.slow
def test_a_killed_worker_and_a_killed_driver(tmp_path, tiny_llama):
    """Ray restarts the worker in the same call; the second call resumes from the newest checkpoint."""
    train = {"max_steps": 400, "save_every": 10, "eval_every": 25, "max_failures": 2, "global_batch_size": 24}
    tree = settings(tmp_path, tiny_llama, methods={"otpo": {}}, train=train, tracking=list(TRACKERS))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree | {"name": "killed"}))
    run = RunFolder(tmp_path / "runs" / "killed")
    label = run.label("otpo")

    def step() -> int:
        whole = label.metrics.read_text().split("\n")[:-1] if label.metrics.exists() else []
        return json.loads(whole[-1])["step"] if whole else 0

    def opened() -> set[str]:
        return set(json.loads(label.tracking.read_text())) if label.tracking.exists() else set()

    with driving(tmp_path) as (process, look):
        until(lambda: (look(), step() >= 13)[1], 300)
        workers = [each for each in look() if each.is_running() and "RayTrainWorker" in " ".join(each.cmdline())]
        workers[0].kill()
        until(lambda: (look(), opened() == TRACKERS.keys())[1], 300)
        at = step()
        until(lambda: (look(), step() >= at + 15)[1], 300)
        process.kill()
    reached = step()
    assert 13 < reached < 400 and not label.model.exists()
    with driving(tmp_path) as (process, look):
        until(lambda: (look(), not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)[1], 500)
        assert process.wait() == 0, (tmp_path / "log.txt").read_text()[-3000:]
    expected = curves_of(label.metrics)
    assert [step for step, _ in expected["train/loss"]] == list(range(1, 401))
    for name, found in held(run.tracking, "killed", "otpo", label.tracking).items():
        exact = name in ("tensorboard", "wandb")  # the others keep the first time that a step was done
        timed = {"train/tokens_per_second", "train/seconds"}
        same(
            {metric: points for metric, points in found.items() if exact or metric not in timed},
            {metric: points for metric, points in expected.items() if exact or metric not in timed},
            rel=1e-5 if exact else 1e-3,
            abs=1e-5,
        )
