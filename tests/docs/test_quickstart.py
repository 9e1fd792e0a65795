"""The quickstart works as it is printed: its blocks run in their order in an empty folder."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from support.docs.printed import follow
from support.servers import ScriptedJudge
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def judge() -> Iterator[ScriptedJudge]:
    server = ScriptedJudge()
    yield server
    server.close()


@pytest.mark.slow
def test_the_quickstart_works_as_printed(tmp_path, judge):
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JUDGE_URL": judge.url,
        "JUDGE_MODEL": "test",
        "HF_HUB_OFFLINE": "1",
    }
    said = follow("quickstart.md", tmp_path, env)
    runs = tmp_path / "runs"
    board = pd.read_csv(runs / "mine" / "leaderboard.csv")
    assert set(board["name"]) == {"dpo", "otpo", "simpo"} and (board["n_total"] == 16).all()
    assert (runs / "mine" / "report.html").is_file() and (tmp_path / "weights.html").is_file()
    assert judge.calls
    curves = runs / "mine" / "tracking" / "tensorboard"
    for label in ("dpo", "otpo", "simpo"):
        events = EventAccumulator(str(curves / label)).Reload()
        assert {"train/loss", "train/rewards/margins", "eval/loss"} <= set(events.Tags()["scalars"])
    # what a later command says that it keeps was kept
    stages = json.loads((runs / "mine" / "manifest.json").read_text())["stages"]
    assert stages["train/dpo"]["trained_together"] == ["dpo", "otpo"]
    assert stages["train/reward"]["trained_together"] == ["reward"]
    assert stages["train/simpo"]["trained_together"] == ["simpo"]
    # every file that the page names is there
    page = (ROOT / "docs" / "quickstart.md").read_text()
    named = set(re.findall(r"`(runs/[\w./-]+)`", page))
    assert named and not [path for path in named if not (tmp_path / path).exists()]
    assert any("preference" in text for command, text in said.items() if command.startswith("otpo data"))
