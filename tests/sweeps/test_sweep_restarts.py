"""Sweeps that are stopped, killed or fail, and then go on: what is kept, what goes on, what is tried again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from support.sweeps import REGS, lines, silent, sweep_tree, swept, trial

from pipeline.recipe import make_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tree(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    return sweep_tree(tiny_llama, tmp_path)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    table = pd.read_csv(folder / "sweep" / "results.csv")
    return {row["trial"]: row for row in table.astype(object).where(table.notna(), None).to_dict("records")}


@pytest.mark.slow
def test_optuna_goes_on_from_the_trials_that_are_there(tree: dict[str, Any], tmp_path: Path, ray_cluster: None) -> None:
    from pipeline.sweep.sweep import sweep

    params = {REGS: {"low": 0.01, "high": 10, "log": True}}
    folder = tmp_path / "runs" / "tiny"
    (first,) = sweep(swept(tree, params=params, search="optuna", num_samples=2), folder, progress=silent, say=silent)
    assert len(first.results) == 2 and first.results[REGS].between(0.01, 10).all()
    # one of the two as a killed call leaves it: its values are tried again, not others in their place
    unfinished = first.results["trial"][1]
    path = folder / "sweep" / "models" / unfinished / "trial.json"
    record = json.loads(path.read_text())
    path.write_text(
        json.dumps({k: v for k, v in record.items() if k not in ("figures", "seconds")} | {"state": "running"})
    )
    (second,) = sweep(swept(tree, params=params, search="optuna", num_samples=3), folder, progress=silent, say=silent)
    assert len(second.results) == 3 and set(first.results["trial"]) < set(second.results["trial"])
    assert set(second.results["state"]) == {"done"}


@pytest.mark.slow
def test_asha_stops_the_worse_trials(tree: dict[str, Any], tmp_path: Path, ray_cluster: None) -> None:
    from pipeline.sweep.sweep import sweep

    tree["train"] |= {"max_steps": 160, "eval_every": 20}  # long after the first evaluation: Tune stops in its own time
    tree["sweep"] = {
        "params": {"methods.otpo.learning_rate": [1e-2, 1e-7, 2e-7]},
        "metric": "eval_loss",
        "scheduler": "asha",
        "reduction_factor": 2,
        "max_concurrent_trials": 1,
    }
    folder = tmp_path / "runs" / "tiny"
    (outcome,) = sweep(make_recipe(tree), folder, progress=silent, say=silent)
    assert outcome.best == "learning_rate-0.01" and outcome.failed == 0
    stopped = outcome.results[outcome.results["state"] == "stopped"]
    assert set(stopped["trial"]) == {"learning_rate-1e-07", "learning_rate-2e-07"}
    for name in stopped["trial"]:
        assert not (folder / "sweep" / "models" / name / "model").exists()
    # the first one stopped while the sweep went on with the second: its seconds ended then
    records = {name: trial(folder, name) for name in stopped["trial"]}
    first, second = sorted(records.values(), key=lambda record: record["started"])
    assert first["started"] + first["seconds"] <= second["started"]

    # one more value: what ASHA stopped stays stopped, and is not trained on
    before = {name: len(lines(folder, name)) for name in records}
    tree["sweep"]["params"] = {"methods.otpo.learning_rate": [1e-2, 1e-7, 2e-7, 3e-7]}
    (again,) = sweep(make_recipe(tree), folder, progress=silent, say=silent)
    assert again.best == "learning_rate-0.01" and len(again.results) == 4
    assert {name: len(lines(folder, name)) for name in records} == before
    assert {name: trial(folder, name)["seconds"] for name in records} == {
        name: record["seconds"] for name, record in records.items()
    }


@pytest.mark.slow
def test_a_killed_sweep_goes_on_from_the_checkpoint(tree: dict[str, Any], tmp_path: Path) -> None:
    tree["sweep"] |= {"max_concurrent_trials": 1}
    tree["train"] |= {"max_steps": 60, "eval_every": 30, "save_every": 5}
    (tmp_path / "tiny.yaml").write_text(json.dumps(tree))
    command = [sys.executable, "-m", "jobs.cli", "sweep", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path / "runs")]
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    folder = tmp_path / "runs" / "tiny"
    models = folder / "sweep" / "models"

    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        while not list((models / "reg-1" / "checkpoints").glob("step-*/complete.json")):
            assert first.poll() is None, "the sweep ended before it could be killed"
            time.sleep(0.05)
        first.kill()
    finished = trial(folder, "reg-0.1")
    assert finished["state"] == "done"
    trained = (models / "reg-0.1" / "model" / "model.safetensors").stat().st_mtime_ns
    second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert second.returncode == 0, second.stderr
    assert (models / "reg-0.1" / "model" / "model.safetensors").stat().st_mtime_ns == trained
    assert trial(folder, "reg-1")["state"] == "done" and "best.yaml" in second.stdout
    # the finished row is as it was, and the other trial went on from its checkpoint
    row = results(folder)["reg-0.1"]
    assert (row["eval_loss"], row["seconds"]) == (finished["figures"]["eval_loss"], finished["seconds"])
    events = [json.loads(line) for line in (folder / "sweep" / "events.jsonl").read_text().splitlines()]
    assert any("reg-1" in str(event) and "goes on from the checkpoint of step" in str(event) for event in events)
    assert [line["step"] for line in lines(folder, "reg-1") if "loss" in line] == list(range(1, 61))
    third = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert "Nothing to do" in third.stdout


def _kill_the_trial(folder: Path, name: str, killed: list[int]) -> None:
    """SIGKILL the process of a trial's Tune function once it has saved a checkpoint."""
    while not list((folder / "sweep" / "models" / name / "checkpoints").glob("step-*/complete.json")):
        time.sleep(0.05)
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "ray::ImplicitFunc" in " ".join(process.cmdline()):
                process.kill()
                killed.append(process.pid)


@pytest.mark.slow
def test_a_trial_whose_process_dies_is_started_again(tree: dict[str, Any], tmp_path: Path, ray_cluster: None) -> None:
    from pipeline.sweep.sweep import sweep

    tree["train"] |= {"max_steps": 60, "eval_every": 30, "save_every": 5}
    folder, killed = tmp_path / "runs" / "tiny", list[int]()
    recipe = swept(tree, params={REGS: [0.1]})
    killer = threading.Thread(target=_kill_the_trial, args=(folder, "reg-0.1", killed), daemon=True)
    killer.start()
    (outcome,) = sweep(recipe, folder, progress=silent, say=silent)
    assert killed and outcome.failed == 0 and outcome.best == "reg-0.1"
    record = trial(folder, "reg-0.1")
    assert record["attempts"] == 2 and record["before"] > 0
    assert [line["step"] for line in lines(folder, "reg-0.1") if "loss" in line] == list(range(1, 61))


@pytest.mark.slow
def test_a_failing_trial_is_a_row_and_the_others_go_on(tree: dict[str, Any], tmp_path: Path, ray_cluster: None) -> None:
    from otpo.errors import WorkError
    from pipeline.sweep.sweep import sweep

    params = {"train.learning_rate": [1e-3, 1e30]}
    folder = tmp_path / "runs" / "tiny"
    (outcome,) = sweep(swept(tree, label="otpo", params=params), folder, progress=silent, say=silent)
    assert outcome.failed == 1 and outcome.best == "learning_rate-0.001"
    row = outcome.results.iloc[-1]
    assert row["state"] == "failed" and "not finite" in row["error"]
    assert row["attempts"] == 1, "a loss that is not finite comes again: it is not tried a second time in this call"
    assert "sweep" not in json.loads((folder / "manifest.json").read_text())["stages"]

    with pytest.raises(WorkError, match="Not one of 1 trials"):
        recipe = swept(tree, label="otpo", params={"train.learning_rate": [1e30]})
        sweep(recipe, folder, progress=silent, say=silent)
