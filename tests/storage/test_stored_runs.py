"""`otpo train --runs s3://...`: a machine is lost in the middle of training, and another one goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.command import otpo
from support.training import losses, settings

from pipeline.storage.claim import CLAIM
from pipeline.storage.copying import LIST
from pipeline.storage.remote import open_remote

STEPS = 1000


def listed(remote) -> dict[str, list[int]]:
    content = remote.read(LIST)
    return json.loads(content)["files"] if content else {}


@pytest.mark.slow
def test_another_machine_goes_on_from_the_last_copy(bucket, tmp_path, tiny_llama):
    """Its losses are those of a run that nothing happened to, and the reference is not computed again."""
    train = {"max_steps": STEPS, "save_every": 100, "workers": 1}
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {}}, train=train)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    address, remote = f"{bucket}/runs", open_remote(f"{bucket}/runs/small")
    first, second = ({"XDG_CACHE_HOME": str(tmp_path / name)} for name in ("first", "second"))

    command = [sys.executable, "-m", "jobs.cli", "train", "recipe.yaml", "--runs", address]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2]), **first}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        until = time.monotonic() + 300
        while not any("checkpoints/" in path for path in listed(remote)):
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            assert time.monotonic() < until
            time.sleep(0.2)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert not any(path.startswith("models/dpo/model/") for path in listed(remote)), "it had finished"
    assert remote.read(CLAIM) is not None, "its claim stays, and is seen to be a dead process's"
    caches = {path for path in open_remote(address).objects() if path.startswith("scorers/")}
    assert caches

    done = otpo(tmp_path, "train", "recipe.yaml", "--runs", address, **second)
    assert done.code == 0, done.err
    assert "files were fetched" in done.err and str(tmp_path / "second") in done.err
    assert {path for path in open_remote(address).objects() if path.startswith("scorers/")} == caches
    label = next((tmp_path / "second" / "otpo" / "runs").glob("*/small/models/dpo"))
    assert "goes on from the checkpoint of step" in (label.parents[1] / "events.jsonl").read_text()

    undisturbed = otpo(tmp_path, "train", "recipe.yaml", "--runs", tmp_path / "local")
    assert undisturbed.code == 0, undisturbed.err
    alone = tmp_path / "local" / "small" / "models" / "dpo"
    assert losses(label) == losses(alone) and len(losses(alone)) == STEPS
    weights = "models/dpo/model/model.safetensors"
    assert remote.read(weights) == (alone / "model" / "model.safetensors").read_bytes()
    assert CLAIM not in remote.objects()

    again = otpo(tmp_path, "train", "recipe.yaml", "--runs", address, XDG_CACHE_HOME=str(tmp_path / "third"))
    assert again.code == 0 and "Nothing to do" in again.out, again.err
