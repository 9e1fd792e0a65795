"""The page about Python: every block is run as it is printed, in order, and gives what the page says of it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "python.md"

pytestmark = pytest.mark.slow


def blocks() -> list[tuple[str, str]]:
    """(language, text) of each fenced block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the page's Python defined."""
    folder, names = tmp_path_factory.mktemp("page"), {"__name__": "page"}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for number, (language, text) in enumerate(blocks(), 1):
            if language == "python":
                exec(compile(text, f"{PAGE.name}, block {number}", "exec"), names)
            else:
                assert language == "bash" and text.startswith("otpo ")
                command = [sys.executable, "-m", "jobs.cli", *shlex.split(text)[1:]]
                subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    finally:
        os.chdir(before)
    return {**names, "folder": folder}


def test_the_run_is_read_as_the_page_says(page):
    losses = page["losses"]
    assert list(losses.columns) == ["dpo", "otpo", "rm"] and list(losses.index) == list(range(1, 13))
    assert losses.notna().all().all()
    metrics = page["results"].metrics
    evaluated = metrics[metrics["eval_loss"].notna()]
    assert evaluated.groupby("label")["step"].agg(list).to_dict() == {name: [6, 12] for name in losses.columns}
    assert page["results"].outputs.groupby("label").size().to_dict() == {"base": 12, "dpo": 12, "otpo": 12}
    assert set(page["preferred"].index) == {"dpo", "otpo"} and page["preferred"].between(1, 2).all()
    table = page["table"]
    assert sorted(table["name"]) == ["dpo", "otpo"] and table.notna().all().all()
    assert page["model"].config.hidden_size == 64 and page["tokenizer"].chat_template


def test_progress_is_shown_and_a_second_call_does_nothing(page, monkeypatch, capsys):
    assert {"train dpo", "train otpo", "train rm", "generate dpo capitals"} <= set(page["seen"])
    monkeypatch.chdir(page["folder"])
    before = (page["folder"] / "runs/notebook/manifest.json").read_text()
    again = page["run_recipe"](page["recipe"])
    assert again.leaderboard.equals(page["results"].leaderboard)
    assert "train" not in capsys.readouterr().err
    after = (page["folder"] / "runs/notebook/manifest.json").read_text()
    assert after == before


def test_token_weights_are_those_of_the_rule(page):
    weights = page["weights"]
    assert list(weights.columns) == ["side", "position", "token_id", "token", "weight"]
    counts = weights.groupby("side").size()
    assert page["sums"].to_dict() == pytest.approx({side: counts.min() for side in ("chosen", "rejected")}, rel=1e-4)
    text = "".join(weights[weights["side"] == "chosen"]["token"])
    assert text.startswith("A WHALE FINDS MY SISTER.")
    assert weights.attrs["metrics"]["weights/transport_mass"] > 0
    assert page["heaviest"]["weight"].is_monotonic_decreasing


def test_the_loss_has_a_gradient_and_trls_names(page):
    assert page["output"].losses.shape == (4,) and page["margins"].shape == (4,)
    assert (page["margins"] > 0).all(), "the policy prefers what the reference does not"
    assert page["policy_chosen"].grad.abs().sum() > 0


def test_the_world_is_that_of_the_recipe(page):
    assert page["world"] is not None and page["small"].train.max_steps == 20
