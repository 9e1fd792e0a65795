"""Several labels in one sweep: equal budgets, a search of its own for each, the best of each side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.html_page import assert_sound
from support.servers import ScriptedJudge
from support.sweeps import REGS, judged_tree, silent, sweep_tree, swept, trial

from eval import layout
from eval.board.report import build
from otpo.errors import UserError
from pipeline.recipe import Recipe, load_recipe, make_recipe
from pipeline.run.folder import RunFolder, SweepFolder
from pipeline.sweep.results import (
    Outcome,
    read_outcomes,
    render,
    render_best,
    with_held_out,
    write_held_out,
    write_results,
    write_summary,
)
from pipeline.sweep.search import plan

RATE = "train.learning_rate"
BETA = "methods.dpo.beta"
LABELS = ["dpo", "otpo"]


@pytest.fixture
def tree(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    return sweep_tree(tiny_llama, tmp_path)


def judged(tree: dict[str, Any], folder: Path, **sweep: Any) -> Recipe:
    return make_recipe(
        tree
        | {"generate": {"tasks": {"facts": str(folder / "prompts.jsonl")}}}
        | {"judge": {"url": "http://127.0.0.1:1", "model": "m", "reference": "base"}, "sweep": sweep}
    )


def test_each_label_is_searched_over_its_own_keys_and_those_of_train(tree: dict[str, Any]) -> None:
    params = {RATE: [1e-3, 1e-4], BETA: [0.1, 0.5], REGS: [0.1, 1.0]}
    dpo, otpo = plan(swept(tree, label=LABELS, params=params))
    assert (dpo.label, otpo.label) == ("dpo", "otpo")
    assert list(dpo.space) == [RATE, BETA] and list(otpo.space) == [RATE, REGS]
    assert dpo.n_trials == otpo.n_trials == 4
    assert dpo.grid is not None and dpo.grid[1] == {RATE: 1e-3, BETA: 0.5}
    assert dpo.trial_name(dpo.grid[1]) == "dpo.learning_rate-0.001_beta-0.5"
    names = [search.trial_name(params) for search in (dpo, otpo) for params in search.grid or []]
    assert len(set(names)) == 8


def test_a_label_alone_is_named_as_before_unless_it_stands_in_a_list(tree: dict[str, Any]) -> None:
    (alone,) = plan(swept(tree, label="otpo"))
    (listed,) = plan(swept(tree, label=["otpo"]))
    assert alone.trial_name({REGS: 0.1}) == "reg-0.1" and alone.named == {}
    assert listed.trial_name({REGS: 0.1}) == "otpo.reg-0.1" and listed.named == {"label": "otpo"}


@pytest.mark.parametrize("search", ["random", "optuna"])
def test_draws_are_as_many_for_each_label(tree: dict[str, Any], search: str) -> None:
    params = {
        "methods.dpo.learning_rate": {"low": 1e-6, "high": 1e-3, "log": True},
        REGS: {"low": 0.01, "high": 1, "log": True},
    }
    dpo, otpo = plan(swept(tree, label=LABELS, params=params, search=search, num_samples=5))
    assert (dpo.n_trials, otpo.n_trials) == (5, 5)
    if search == "random":
        assert len(dpo.grid or []) == len(otpo.grid or []) == 5


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"label": LABELS, "params": {BETA: [0.1], REGS: [0.1, 1.0]}}, r"equal budgets.*1 of dpo, 2 of otpo"),
        ({"label": LABELS}, r"nothing to try for 'dpo'"),
        ({"label": ["dpo", "simpo"], "params": {RATE: [1e-3]}}, r"no label 'simpo'. It has: dpo, otpo"),
        ({"label": ["dpo"], "params": {RATE: [1e-3], REGS: [0.1]}}, r"keys of 'otpo', which sweep.label does not name"),
        ({"params": {BETA: [0.1], REGS: [0.1]}}, r"one label.*dpo, otpo: set sweep\.label.*list"),
        ({"label": []}, "at least one label"),
        ({"label": ["dpo", "dpo"]}, "each once"),
    ],
)
def test_an_unequal_or_impossible_comparison_is_refused(
    tree: dict[str, Any], sweep: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        plan(swept(tree, **sweep))


def test_a_key_of_train_that_one_label_overrides_is_refused(tree: dict[str, Any]) -> None:
    tree["methods"]["otpo"] = {"learning_rate": 1e-4}
    with pytest.raises(UserError, match=r"methods\.otpo has a `learning_rate` of its own"):
        plan(swept(tree, label=LABELS, params={RATE: [1e-3, 1e-4]}))


def judged_outcomes(tree: dict[str, Any], folder: Path) -> tuple[Recipe, list[Outcome]]:
    """Two trials of each label, made up: the better of DPO's has rate 1e-3, the better of OTPO's reg 0.5."""
    recipe = judged(tree, folder, label=LABELS, params={RATE: [1e-3, 1e-4], BETA: [0.2], REGS: [0.5]})
    searches = plan(recipe)
    trials = []
    for search, rates in zip(searches, ((55.0, 45.0), (48.0, 60.0)), strict=True):
        grid = search.grid or []
        trials.append(
            [
                {"name": search.trial_name(params), **search.named, "params": params, "state": "done"}
                | {"figures": {"win_rate": rate, "win_rate_low": rate - 4, "win_rate_high": rate + 4, "n_total": 9}}
                for params, rate in zip(grid, rates, strict=True)
            ]
        )
    outcomes = write_results(recipe, searches, SweepFolder(folder / "sweep"), trials)
    fresh = {"seed": 42, "win_rate_low": 40.0, "win_rate_high": 60.0, "avg_length": 70.0, "n_total": 3}
    outcomes = [
        with_held_out(outcome, [{"trial": outcome.best, "win_rate": rate, **fresh}])
        for outcome, rate in zip(outcomes, (51.25, 52.5), strict=True)
    ]
    write_held_out(outcomes)
    write_summary(outcomes)
    return recipe, outcomes


def test_the_best_of_each_label_is_a_row_a_recipe_and_a_figure_on_fresh_prompts(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    recipe, (dpo, otpo) = judged_outcomes(tree, tmp_path)
    assert dpo.best == "dpo.learning_rate-0.001_beta-0.2" and otpo.best == "otpo.learning_rate-0.0001_reg-0.5"
    table = pd.read_csv(dpo.folder.results)
    assert list(table)[:5] == ["label", "trial", RATE, BETA, REGS] and list(table)[-1] == "error"
    assert table["label"].tolist() == ["dpo", "dpo", "otpo", "otpo"]
    assert table["trial"].tolist()[::2] == [dpo.best, otpo.best]
    assert table[REGS].isna().tolist() == [True, True, False, False]
    # the recipe has the values of each, a key of `train` as the label's own
    best = load_recipe(dpo.folder.best)
    assert best.train_of("dpo").learning_rate == 1e-3 and best.train_of("otpo").learning_rate == 1e-4
    assert best.method("dpo").hyperparameters["beta"] == 0.2 and best.method("otpo").hyperparameters["reg"] == 0.5
    assert best.train.learning_rate == recipe.train.learning_rate and not best.sweep.params
    held_out = pd.read_csv(dpo.folder.held_out)
    assert dict(zip(held_out["label"], held_out["win_rate"], strict=True)) == {"dpo": 51.25, "otpo": 52.5}
    assert str(otpo.caution).startswith("otpo: Win rate of otpo.") and "52.5% (40.0 to 60.0)" in str(otpo.caution)
    # a later call reads the same
    for was, found in zip((dpo, otpo), read_outcomes(dpo.folder, plan(recipe)), strict=True):
        assert (found.best, found.caution, found.did) == (was.best, was.caution, False)
        assert set(found.results) == set(was.results) and render(found).row_count == 2
    assert render_best([dpo, otpo]).row_count == 2


def test_the_page_shows_the_labels_side_by_side(tree: dict[str, Any], tmp_path: Path) -> None:
    _, (dpo, _) = judged_outcomes(tree, tmp_path)
    page = build([dpo.folder.path], dpo.folder.path).read_text()
    assert_sound(dpo.folder.path / layout.REPORT)
    assert "The best of each label" in page and page.count("The winner of 2 trials") == 2
    side_by_side = page[page.index("The best of each label") :]
    assert side_by_side.index("51.2") < side_by_side.index("52.5") < side_by_side.index("The winner of 2 trials")


def test_a_label_without_a_finished_trial_is_shown_and_keeps_its_values(tree: dict[str, Any], tmp_path: Path) -> None:
    recipe = swept(tree, label=LABELS, params={RATE: [1e-3], REGS: [0.5], BETA: [0.2]})
    searches, folder = plan(recipe), SweepFolder(tmp_path / "sweep")
    ends: list[dict[str, Any]] = [
        {"state": "failed", "error": "out of memory"},
        {"state": "done", "figures": {"eval_loss": 0.5}},
    ]
    trials = [
        [{"name": search.trial_name(params), **search.named, "params": params} | end for params in search.grid or []]
        for search, end in zip(searches, ends, strict=True)
    ]
    outcomes = write_results(recipe, searches, folder, trials)
    assert [outcome.best for outcome in outcomes] == [None, "otpo.learning_rate-0.001_reg-0.5"]
    best = load_recipe(folder.best)
    assert best.method("dpo").hyperparameters["beta"] == recipe.method("dpo").hyperparameters["beta"]
    assert best.method("otpo").hyperparameters["reg"] == 0.5
    write_summary(outcomes)
    page = build([folder.path], folder.path).read_text()
    assert_sound(folder.path / layout.REPORT)
    assert "no trial came to its end" in page and render_best(outcomes).row_count == 2


@pytest.mark.slow
def test_labels_are_searched_one_after_the_other_and_kept(tiny_llama: Path, tmp_path: Path, ray_cluster: None) -> None:
    from pipeline.sweep.sweep import sweep

    folder = RunFolder(tmp_path / "runs" / "tiny")

    def models() -> dict[str, int]:
        found = folder.sweep.models.glob("*/model/model.safetensors")
        return {path.parents[1].name: path.stat().st_mtime_ns for path in found}

    with ScriptedJudge() as judge:
        tree = judged_tree(tiny_llama, tmp_path, judge.url)
        tree["methods"]["simpo"] = {}
        tree["sweep"] = {"label": LABELS, "params": {RATE: [1e-3, 1e-4]}}
        outcomes = sweep(make_recipe(tree), folder.path, progress=silent, say=silent)
        assert [outcome.search.label for outcome in outcomes] == LABELS
        assert all(outcome.failed == 0 and len(outcome.results) == 2 for outcome in outcomes)
        first = models()
        assert set(first) == {f"{label}.learning_rate-{rate}" for label in LABELS for rate in ("0.001", "0.0001")}
        records = [trial(folder.path, name) for name in first]
        assert {record["label"] for record in records} == set(LABELS)
        ends = {label: [r["started"] for r in records if r["label"] == label] for label in LABELS}
        assert max(ends["dpo"]) < min(ends["otpo"])
        # the winners of both were judged on prompts that no trial was judged on
        held_out = pd.read_csv(folder.sweep.held_out)
        assert held_out["trial"].tolist() == [outcome.best for outcome in outcomes]
        assert held_out["n_total"].tolist() == [3, 3]
        assert not sweep(make_recipe(tree), folder.path, progress=silent, say=silent)[0].did
        # one more label: what is trained stays as it is
        tree["sweep"]["label"] = [*LABELS, "simpo"]
        again = sweep(make_recipe(tree), folder.path, progress=silent, say=silent)
        assert [len(outcome.results) for outcome in again] == [2, 2, 2]
        assert first.items() <= models().items() and len(models()) == 6
    best = load_recipe(folder.sweep.best)
    for outcome in again:
        row = outcome.results.iloc[0]
        assert best.train_of(outcome.search.label).learning_rate == row[RATE]
    board = pd.read_csv(folder.sweep.leaderboard)
    assert set(board[board["task"] == "sums"]["name"]) == set(models())
    stages = json.loads(folder.manifest.read_text())["stages"]
    assert "sweep" in stages
