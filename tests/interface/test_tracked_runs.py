"""Trackers of real runs: each holds the training and the leaderboard once, whatever dies in between."""

from __future__ import annotations

import json
import math
import signal
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import yaml
from support.trackers.files import (
    mlflow_client,
    of_mlflow,
    of_tensorboard,
    of_wandb,
    tensorboard_text,
)
from support.trackers.runs import SECRET, STORE, command, curves_of, environment, held, same, until
from support.training import settings

from eval.board.leaderboard import read_leaderboard
from pipeline.run.folder import RunFolder
from pipeline.tracking.trackers import TRACKERS


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
