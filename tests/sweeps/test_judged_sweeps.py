"""Judged sweeps on real Ray with a real HTTP judge: held-out prompts, fresh seeds, several objectives, preferences."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from support.servers import ScriptedJudge
from support.sweeps import PROMPTS, REGS, judged_tree, silent, trial

from pipeline.recipe import load_recipe, make_recipe
from pipeline.run.folder import RunFolder


@pytest.mark.slow
def test_the_winner_is_judged_again_on_fresh_prompts_and_seeds(
    tiny_llama: Path, tmp_path: Path, ray_cluster: None
) -> None:
    from pipeline.sweep.sweep import sweep

    with ScriptedJudge() as judge:
        tree = judged_tree(tiny_llama, tmp_path, judge.url)
        tree["sweep"] = {"params": {REGS: [0.1, 1.0]}, "metric": ["win_rate", "avg_length"], "held_out_seeds": 1}
        folder = RunFolder(tmp_path / "runs" / "tiny")
        (outcome,) = sweep(make_recipe(tree), folder.path, progress=silent, say=silent)
        calls = len(judge.calls)
        assert not sweep(make_recipe(tree), folder.path, progress=silent, say=silent)[0].did
        assert len(judge.calls) <= calls + 2  # no verdict is asked for again
    assert outcome.failed == 0 and outcome.best is not None and outcome.held_out is not None
    verdicts = pd.read_parquet(folder.sweep.sweep_verdicts)
    prompts = {task: set(frame["instruction"]) for task, frame in verdicts.groupby("task")}
    assert set(prompts) == {"sums", "sums-held-out"}
    assert len(prompts["sums"]) == 9 and len(prompts["sums-held-out"]) == 3
    assert prompts["sums"] | prompts["sums-held-out"] == set(PROMPTS)
    assert set(verdicts[verdicts["task"] == "sums"]["generator"]) == {"reg-0.1", "reg-1"}

    # the figures are the means of the very verdicts
    seeds = outcome.held_out
    assert seeds["trial"].tolist() == [outcome.best, f"{outcome.best}.seed-43"] and seeds["seed"].tolist() == [42, 43]
    for table, task in ((outcome.results, "sums"), (seeds, "sums-held-out")):
        for row in table.to_dict("records"):
            own = verdicts[(verdicts["task"] == task) & (verdicts["generator"] == row["trial"])]
            assert row["win_rate"] == pytest.approx(100 * (own["preference"] - 1).mean())
            assert row["n_total"] == len(own)
    assert outcome.results["front"].any()
    page = folder.sweep.report.read_text()
    assert "The winner of 2 trials" in page and f"{seeds['win_rate'][0]:.1f}" in page
    assert outcome.caution is not None and "on 3 fresh prompts" in outcome.caution
    assert load_recipe(folder.sweep.best).name == "tiny-best"


@pytest.mark.slow
def test_a_search_by_preferences_judges_trials_against_the_best_before_them(
    tiny_llama: Path, tmp_path: Path, ray_cluster: None
) -> None:
    pytest.importorskip("glis", reason="the extra glisp is not installed")
    from pipeline.sweep.sweep import sweep

    with ScriptedJudge() as judge:
        tree = judged_tree(tiny_llama, tmp_path, judge.url)
        ranges = {REGS: {"low": 0.01, "high": 1.0, "log": True}}
        tree["sweep"] = {"params": ranges, "search": "glisp", "num_samples": 3}
        folder = tmp_path / "runs" / "tiny"
        (outcome,) = sweep(make_recipe(tree), folder, progress=silent, say=silent)
    assert outcome.failed == 0 and len(outcome.results) == 3
    records = sorted((trial(folder, name) for name in outcome.results["trial"]), key=lambda record: record["started"])
    best = None
    for record in records:  # each against the winner of those before it
        assert record["against"] == best
        if best is None or record["figures"]["win_rate"] > 50:
            best = record["name"]
    assert outcome.best == best == outcome.results["trial"][0]
    assert outcome.held_out is not None and outcome.held_out["trial"].tolist() == [best]
    assert load_recipe(folder / "sweep" / "best.yaml").method("otpo").hyperparameters["reg"] == pytest.approx(
        outcome.results[REGS][0]
    )
