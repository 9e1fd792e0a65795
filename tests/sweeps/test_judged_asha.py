"""Eight trials under ASHA by a judge's metric, killed in the middle: the same winner, and nothing paid for twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.servers import Call, ScriptedJudge
from support.sweeps import judged_tree, lines, trial

from pipeline.recipe import load_recipe
from pipeline.run.folder import RunFolder
from pipeline.train.frozen_cache import FrozenLogProbs

ROOT = Path(__file__).resolve().parents[2]
RATE = "methods.otpo.learning_rate"
RATES = [1e-7, 1e-2, 2e-7, 3e-3, 3e-7, 1e-3, 3e-2, 4e-7]


def table(folder: RunFolder) -> pd.DataFrame:
    """The results by trial, without what a kill may change."""
    frame = pd.read_csv(folder.sweep.results).set_index("trial").sort_index()
    return frame.drop(columns=["seconds", "attempts"])


def questions(calls: list[Call]) -> list[str]:
    return [json.dumps(call.body, sort_keys=True) for call in calls]


@pytest.mark.slow
def test_eight_trials_under_asha_that_are_killed_end_as_undisturbed_ones(tiny_llama: Path, tmp_path: Path) -> None:
    env = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def command(runs: str, verb: str = "sweep", recipe: Path = tmp_path / "tiny.yaml") -> list[str]:
        return [sys.executable, "-m", "jobs.cli", verb, str(recipe), "--runs", str(tmp_path / runs)]

    def done(words: list[str]) -> str:
        ended = subprocess.run(words, env=env, capture_output=True, text=True, timeout=900)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    whole, killed = (RunFolder(tmp_path / runs / "tiny") for runs in ("whole", "killed"))
    with ScriptedJudge() as judge:
        tree: dict[str, Any] = judged_tree(tiny_llama, tmp_path, judge.url)
        tree["train"] |= {"max_steps": 12, "save_every": 2}
        tree["sweep"] = {"params": {RATE: RATES}, "scheduler": "asha", "judge_every": 6, "reduction_factor": 2}
        tree["sweep"] |= {"max_concurrent_trials": 1}  # ASHA's decisions hang on the order of reports: one at a time
        (tmp_path / "tiny.yaml").write_text(json.dumps(tree))
        done(command("whole"))
        asked = questions(judge.calls)

        middle = killed.sweep.label("learning_rate-3e-07")  # the fifth
        with subprocess.Popen(
            command("killed"), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as first:
            while not list(middle.checkpoints.glob("step-*/complete.json")):
                assert first.poll() is None, "the sweep ended before it could be killed"
                time.sleep(0.02)
            first.kill()
        names = [path.name for path in (killed.path / "sweep" / "models").iterdir()]
        before = {name: trial(killed.path, name) for name in names if trial(killed.path, name)["state"] != "running"}
        assert 0 < len(before) < len(RATES)
        printed = done(command("killed"))
        again = questions(judge.calls)[len(asked) :]
        assert "best.yaml" in printed and "Nothing to do" in done(command("killed"))
        done(command("winner", "train", killed.sweep.best))

    # the same table, with the same winner; what had ended is as it was
    results = table(whole)
    assert len(results) == len(RATES) and "stopped" in set(results["state"]) and "failed" not in set(results["state"])
    pd.testing.assert_frame_equal(table(killed), results, rtol=1e-6)
    winner = pd.read_csv(killed.sweep.results)["trial"][0]
    assert winner == pd.read_csv(whole.sweep.results)["trial"][0]
    assert load_recipe(killed.sweep.best).train_of("otpo").learning_rate == results[RATE][winner]
    for name, record in before.items():
        now = trial(killed.path, name)
        assert (now["state"], now["figures"], now["seconds"]) == (record["state"], record["figures"], record["seconds"])
    for name in results.index:
        steps = [line["step"] for line in lines(killed.path, name) if "loss" in line]
        assert steps == list(range(1, len(steps) + 1)), "a step was repeated or lost"

    # paid for once: beside the calls in flight at the kill, nothing is asked twice, and nothing else than before
    assert set(again) == set(asked)
    assert len(again) <= len(set(again)) + 8
    # the reference was computed once, for all trials of both calls
    (cache,) = (tmp_path / "killed" / "scorers").iterdir()
    assert sum(len(part.keys) for part in FrozenLogProbs(cache).rows.parts) == 24
    # the figure that chose the winner, and the one on prompts that chose nothing
    assert winner in set(pd.read_csv(killed.sweep.held_out)["trial"])
