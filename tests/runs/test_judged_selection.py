"""The best step of a training by what a judge says: choosing among milestones, what is refused, and a run on Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.servers import ScriptedJudge
from support.sweeps import judged_tree, silent

from otpo.errors import UserError, WorkError
from otpo.files import write_json
from pipeline.milestones.choice import JudgedChoice
from pipeline.recipe import Recipe, make_recipe
from pipeline.run.folder import LabelFolder, RunFolder
from pipeline.run.run import run

START = {"value": None, "step": None, "since": 0}


def exported(label: LabelFolder, *steps: int) -> None:
    for step in steps:
        for folder in (label.milestone(step).model, label.milestone(step).adapter):
            folder.mkdir(parents=True)
            (folder / "weights").write_text(str(step))


def judged(label: LabelFolder, **rates: float | None) -> None:
    for step, rate in rates.items():
        number = int(step.removeprefix("at"))
        figures = {"win_rate": rate, "avg_length": 9.0}
        write_json(
            label.milestone(number).judged, {"step": number, "model_sha256": f"sha-{number}", "figures": figures}
        )


def test_the_best_milestone_becomes_the_model_and_says_where_it_comes_from(tmp_path: Path) -> None:
    label = LabelFolder(tmp_path / "dpo")
    choice = JudgedChoice(label, "win_rate", "max")
    exported(label, 20, 40, 60)
    assert choice.look(START) == START
    judged(label, at40=55.0)
    assert choice.look(START) == START, "figures count in the order of the steps"
    judged(label, at20=52.0)
    best = choice.look(START)
    assert best == {"value": 55.0, "step": 40, "since": 0, "seen": 40}
    assert not label.milestone(20).model.exists() and label.milestone(40).model.exists()
    assert label.milestone(60).model.exists(), "it is not judged yet"
    judged(label, at60=50.0)
    best = choice.settle(best)
    assert best == {"value": 55.0, "step": 40, "since": 1, "seen": 60}
    choice.take(best)
    assert (label.model / "weights").read_text() == (label.adapter / "weights").read_text() == "40"
    said = json.loads(label.selected.read_text())
    assert said == {"metric": "win_rate", "mode": "max", "step": 40, "value": 55.0, "model_sha256": "sha-40"}
    assert not label.milestone(60).model.exists() and label.milestone(60).judged.exists()


def test_it_chooses_alike_whenever_it_looks_and_from_an_older_checkpoint(tmp_path: Path) -> None:
    label = LabelFolder(tmp_path / "dpo")
    choice = JudgedChoice(label, "win_rate", "min")
    exported(label, 2, 4, 6, 8)
    judged(label, at2=52.0, at4=50.0, at6=50.0, at8=51.0)
    once = choice.look(START)
    assert once == {"value": 50.0, "step": 4, "since": 2, "seen": 8}, "of equals the first"
    assert choice.look({"value": 52.0, "step": 2, "since": 0, "seen": 2}) == once
    assert choice.look(once) == once


def test_a_milestone_that_could_not_be_judged_ends_training_in_words(tmp_path: Path) -> None:
    label = LabelFolder(tmp_path / "dpo")
    choice = JudgedChoice(label, "win_rate", "max")
    exported(label, 20)
    write_json(label.milestone(20).judged, {"error": "WorkError: the judge is gone", "step": 20})
    with pytest.raises(WorkError, match=r"dpo, milestone of step 20: WorkError: the judge is gone.*judges it again"):
        choice.look(START)
    judged(label, at20=None)
    with pytest.raises(WorkError, match=r"best_metric is 'win_rate', but the board gives: avg_length"):
        choice.look(START)


def selecting(model: Path, folder: Path, url: str = "http://127.0.0.1:1", **changes: Any) -> dict[str, Any]:
    tree = judged_tree(model, folder, url)
    train = {"max_steps": 12, "eval_every": 4, "best_metric": "win_rate", "best_mode": "max", "learning_rate": 1e-2}
    tree["train"] |= train | changes.pop("train", {})
    tree.pop("sweep")
    return tree | {"methods": {"dpo": {}}} | changes


def checked(tree: dict[str, Any]) -> Recipe:
    from pipeline.run.checks import _check_chosen_by_judge

    recipe = make_recipe(tree)
    _check_chosen_by_judge(recipe, "dpo")
    return recipe


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"best_mode": "min"}}, r"worst step by win_rate: set it to max"),
        ({"train": {"eval_every": None}}, r"need train\.eval_every"),
        ({"train": {"best_metric": "win_rates"}}, r"of the judge's board \(win_rate"),
        ({"generate": {}}, r"generate\.tasks is empty"),
        ({"judge": {"url": "http://127.0.0.1:1", "model": "m", "reference": "dpo"}}, r"set judge\.reference=base"),
        ({"judge": {"vllm": "dpo", "reference": "base"}}, r"'dpo' is one of them: .* judge\.vllm to a folder"),
        ({"train": {"best_metric": "length_controlled_winrate"}}, r"needs judge\.calibration"),
    ],
)
def test_a_choice_that_no_judge_can_make_is_refused(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        checked(selecting(tiny_llama, tmp_path, **changes))


def test_lengths_may_be_chosen_by_less(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = checked(selecting(tiny_llama, tmp_path, train={"best_metric": "avg_length", "best_mode": "min"}))
    assert recipe.train_of("dpo").selects_by_judge
    assert (
        not recipe.model_copy(update={"train": recipe.train.model_copy(update={"best_metric": "eval_loss"})})
        .train_of("dpo")
        .selects_by_judge
    )


@pytest.mark.slow
def test_a_run_exports_the_step_that_the_judge_finds_best(tiny_llama: Path, tmp_path: Path, ray_cluster: None) -> None:
    folder = RunFolder(tmp_path / "runs" / "tiny")
    with ScriptedJudge() as judge:
        recipe = make_recipe(selecting(tiny_llama, tmp_path, judge.url))
        run(recipe, folder.path, progress=silent)
        calls = len(judge.calls)
        assert not run(recipe, folder.path, progress=silent).did and len(judge.calls) <= calls + 2
    label = folder.label("dpo")
    assert [step for step, _ in label.milestones()] == [4, 8, 12]
    rates = {}
    for step, milestone in label.milestones():
        own = pd.read_parquet(milestone.verdicts_on("sums"))
        rates[step] = 100 * (own["preference"] - 1).mean()
        assert json.loads(milestone.judged.read_text())["figures"]["win_rate"] == pytest.approx(rates[step])
        assert not milestone.model.exists()
    assert len(set(rates.values())) > 1
    selected = json.loads(label.selected.read_text())
    assert selected["step"] == max(rates, key=rates.__getitem__)
    # from the checkpoint to the board: the model that was chosen is the one that was answered with, and its win rate
    # is that of the milestone, since prompts, sampling and judge are the same
    report = json.loads((label.generation("sums") / "generation.json").read_text())
    assert report["model_sha256"] == selected["model_sha256"]
    board = pd.read_csv(folder.leaderboard).set_index("name")
    assert board["win_rate"]["dpo"] == pytest.approx(selected["value"])
