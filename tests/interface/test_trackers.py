"""Trackers: what they hold is what the run's files hold, each step once, whatever dies in between."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.trackers.files import (
    mlflow_client,
    of_mlflow,
    of_tensorboard,
)
from support.trackers.runs import SECRET, curves_of, environment, held, same, until
from support.training import settings
from transformers.integrations.integration_utils import rewrite_logs

from otpo.errors import UserError
from otpo.files import write_atomically
from pipeline.recipe import identity, make_recipe
from pipeline.run.folder import RunFolder
from pipeline.tracking.mirror import settings_of, tracker_names, tracking
from pipeline.tracking.trackers import PACKAGES, TRACKERS, check_trackers

ROOT = Path(__file__).resolve().parents[2]


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
