"""Trials whose models are judged while they train: what is asked for, what is kept, and ASHA by a judge's metric."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import pytest
from support.servers import ScriptedJudge
from support.sweeps import REGS, judged_tree, lines, silent, sweep_tree, trial

from otpo.errors import UserError
from pipeline.milestones.judged import forget_milestones, is_milestone, judged_milestones, note_judged
from pipeline.recipe import Recipe, make_recipe
from pipeline.run.folder import LabelFolder, RunFolder
from pipeline.sweep.search import plan

RATE = "methods.otpo.learning_rate"


def judged(model: Path, folder: Path, **sweep: Any) -> Recipe:
    tree = sweep_tree(model, folder)
    tree["train"].pop("eval_every")
    tree |= {"generate": {"tasks": {"facts": "prompts.jsonl"}}}
    tree |= {"judge": {"url": "http://127.0.0.1:1", "model": "m", "reference": "base"}}
    tree["train"] |= sweep.pop("train", {})
    return make_recipe(tree | {"sweep": {"params": {REGS: [0.1, 1.0]}} | sweep})


def test_asha_judges_on_the_way_as_often_as_asked_or_as_evaluations_come(tiny_llama: Path, tmp_path: Path) -> None:
    def every(**sweep: Any) -> int | None:
        return plan(judged(tiny_llama, tmp_path, **sweep))[0].judge_every

    assert every() is None
    assert every(judge_every=3) == 3
    assert every(train={"eval_every": 2}) is None, "evaluations alone cost no judge"
    assert every(scheduler="asha", train={"eval_every": 2}) == 2
    assert every(scheduler="asha", judge_every=3, train={"eval_every": 2}) == 3
    assert every(metric="eval_loss", scheduler="asha", train={"eval_every": 2}) is None


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"scheduler": "asha"}, r"win_rate comes after.*sweep\.judge_every"),
        ({"metric": "eval_loss", "judge_every": 2, "train": {"eval_every": 2}}, "is for metrics of a judge"),
        ({"search": "glisp", "judge_every": 2, "params": {REGS: {"low": 0.1, "high": 1}}}, "trained models only"),
        ({"judge_every": 0}, "judge_every"),
    ],
)
def test_milestones_that_cannot_be_are_refused(
    tiny_llama: Path, tmp_path: Path, sweep: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        plan(judged(tiny_llama, tmp_path, **sweep))


def test_the_last_step_is_no_milestone() -> None:
    assert [step for step in range(1, 9) if is_milestone(step, 2, 8)] == [2, 4, 6]
    assert not any(is_milestone(step, None, 8) for step in range(1, 9))


def test_a_judged_milestone_keeps_its_figures_and_not_its_weights(tmp_path: Path) -> None:
    label = LabelFolder(tmp_path / "models" / "reg-1")
    for step in (120, 20):
        folder = label.milestone(step)
        folder.model.mkdir(parents=True)
        (folder.model / "model.safetensors").write_text("weights")
    assert [step for step, _ in label.milestones()] == [20, 120] and judged_milestones(label) == []
    note_judged(label.milestone(20), 20, "abc", {"win_rate": 51.0}, keeps_weights=False)
    assert judged_milestones(label) == [{"win_rate": 51.0, "step": 20}]
    assert not label.milestone(20).model.exists() and label.milestone(120).model.exists()
    assert json.loads(label.milestone(20).judged.read_text())["model_sha256"] == "abc"
    forget_milestones(label)
    assert label.milestones() == []


def stopped_by_asha(trials: dict[str, list[dict[str, Any]]]) -> dict[str, int]:
    """ASHA with reduction factor 2: which of some trials, one after the other, are stopped, and after which step."""
    rungs: dict[int, list[float]] = defaultdict(list)
    stopped = {}
    for name, milestones in trials.items():
        for each in milestones:
            before, rungs[each["step"]] = rungs[each["step"]], [*rungs[each["step"]], each["win_rate"]]
            if before and each["win_rate"] < median(before):
                stopped[name] = each["step"]
                break
    return stopped


@pytest.mark.slow
def test_asha_stops_trials_by_what_the_judge_says_on_the_way(
    tiny_llama: Path, tmp_path: Path, ray_cluster: None
) -> None:
    from pipeline.sweep.sweep import sweep

    folder = RunFolder(tmp_path / "runs" / "tiny")
    with ScriptedJudge() as judge:
        tree = judged_tree(tiny_llama, tmp_path, judge.url)
        tree["train"] |= {"max_steps": 12}
        # two that hardly train write what the base writes, a draw; one that does is better or worse than that, and in
        # this order ASHA stops one of the others or it
        tree["sweep"] = {"params": {RATE: [1e-7, 1e-2, 2e-7]}, "scheduler": "asha", "judge_every": 4}
        tree["sweep"] |= {"reduction_factor": 2, "max_concurrent_trials": 1}
        (outcome,) = sweep(make_recipe(tree), folder.path, progress=silent, say=silent)
        assert outcome.failed == 0 and len(outcome.results) == 3
        stopped = outcome.results["trial"][outcome.results["state"] == "stopped"].tolist()
        assert stopped, "the judge's figures on the way decided nothing"
        for name in outcome.results["trial"]:
            label = folder.sweep.label(name)
            found = judged_milestones(label)
            assert found and [each["step"] for each in found] == [4, 8][: len(found)]
            for each in found:
                milestone = label.milestone(each["step"])
                own = pd.read_parquet(milestone.verdicts_on("sums"))
                assert each["win_rate"] == pytest.approx(100 * (own["preference"] - 1).mean())
                assert set(own["generator"]) == {f"{name}@{each['step']}"} and not milestone.model.exists()
                report = json.loads((milestone.generation("sums") / "generation.json").read_text())
                assert json.loads(milestone.judged.read_text())["model_sha256"] == report["model_sha256"]
            assert label.verdicts_on("sums").exists() == (name not in stopped)
        order = [f"learning_rate-{rate:g}" for rate in (1e-7, 1e-2, 2e-7)]
        # a milestone that was judged before Tune had stopped its trial decided nothing
        steps = {name: trial(folder.path, name)["figures"]["step"] for name in stopped}
        assert steps == stopped_by_asha({name: judged_milestones(folder.sweep.label(name)) for name in order})
        calls, before = len(judge.calls), {name: len(lines(folder.path, name)) for name in outcome.results["trial"]}
        # the same command: nothing is trained or judged again
        sweep(make_recipe(tree), folder.path, progress=silent, say=silent)
        assert {name: len(lines(folder.path, name)) for name in before} == before and len(judge.calls) <= calls + 2
