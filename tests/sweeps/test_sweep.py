"""What a sweep tries, and real sweeps on Ray: a grid, a failing trial, a scorer."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from support.sweeps import REGS, silent, sweep_tree, swept

from otpo.errors import UserError
from pipeline.recipe import load_recipe
from pipeline.run.folder import RunFolder, SweepFolder
from pipeline.sweep.search import plan
from pipeline.sweep.space import combinations, trial_name
from pipeline.sweep.trial_recipes import best_recipe, frozen_labels, trial_recipe


@pytest.fixture
def tree(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    return sweep_tree(tiny_llama, tmp_path)


def test_grid_is_the_product_of_the_lists(tree: dict[str, Any]) -> None:
    recipe = swept(tree, params={REGS: [0.1, 1.0], "methods.otpo.cost": ["l2", "cosine"]})
    (found,) = plan(recipe)
    assert found.grid == [
        {REGS: reg, "methods.otpo.cost": cost} for reg in (0.1, 1.0) for cost in ("l2", "cosine")
    ]  # fmt: skip
    assert (found.label, found.mode, found.task, found.n_trials) == ("otpo", "min", None, 4)
    assert [trial_name(params) for params in found.grid][1] == "reg-0.1_cost-cosine"


def test_random_draws_are_seeded_distinct_and_within_bounds(tree: dict[str, Any]) -> None:
    params = {REGS: {"low": 0.01, "high": 10, "log": True}, "train.max_steps": {"low": 2, "high": 9, "integer": True}}
    recipe = swept(tree, params=params, search="random", num_samples=40)
    draws = combinations(recipe.sweep, recipe.sweep.params)
    assert draws == combinations(recipe.sweep, recipe.sweep.params) and len({trial_name(draw) for draw in draws}) == 40
    assert all(0.01 <= draw[REGS] <= 10 and draw["train.max_steps"] in range(2, 10) for draw in draws)
    # log-uniform: half of the draws below the geometric mean
    assert 10 <= sum(draw[REGS] < math.sqrt(0.01 * 10) for draw in draws) <= 30
    few = swept(tree, params={REGS: [0.1, 1.0]}, search="random", num_samples=40)
    assert len(combinations(few.sweep, few.sweep.params)) == 2


def test_nested_params_of_the_command_line_are_dotted(tree: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(tree))
    recipe = load_recipe(path, [f"sweep.params.{REGS}=[0.3]", "sweep.params.train.learning_rate={low: 1e-5, high: 1}"])
    assert recipe.sweep.params[REGS] == [0.3]
    assert recipe.sweep.params["train.learning_rate"].high == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({"params": {}}, "sweep.params is empty"),
        ({"params": {"generate.seed": [1]}}, "expected methods.LABEL.KEY or train.KEY"),
        ({"params": {"methods.simpo.beta": [1.0]}}, "no label 'simpo'"),
        ({"params": {"methods.otpo.regg": [1.0]}}, "did you mean 'reg'"),
        ({"params": {REGS: [0.1, -1.0]}}, "above 0"),
        ({"params": {"train.workers": [1, 2]}}, "does not change what is trained"),
        ({"params": {"train.learning_rates": [1e-3]}, "label": "otpo"}, "Did you mean 'learning_rate'"),
        ({"params": {"train.learning_rate": [1e-3, 1e-4]}}, "sweep.label"),
        ({"params": {REGS: [0.1], "methods.dpo.beta": [0.1]}}, "one label"),
        ({"params": {REGS: {"low": 0.1, "high": 1}}}, "grid needs a list"),
        ({"params": {REGS: [0.1, 0.1]}}, "list each value once"),
        ({"metric": "eval_los"}, "Did you mean eval_loss"),
        ({"metric": "win_rate"}, "set generate.tasks and judge.url"),
    ],
)
def test_bad_sweeps_are_refused_with_the_remedy(tree: dict[str, Any], sweep: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan(swept(tree, **sweep))


def test_a_key_that_the_label_overrides_is_refused(tree: dict[str, Any]) -> None:
    tree["methods"]["otpo"] = {"learning_rate": 1e-4}
    with pytest.raises(UserError, match=r"Sweep methods\.otpo\.learning_rate instead"):
        plan(swept(tree, label="otpo", params={"train.learning_rate": [1e-3, 1e-4]}))


def test_an_evaluated_metric_needs_evaluations(tree: dict[str, Any]) -> None:
    tree["train"].pop("eval_every")
    with pytest.raises(UserError, match=r"set train\.eval_every"):
        plan(swept(tree))


def test_trial_and_best_recipes_carry_the_values(tree: dict[str, Any]) -> None:
    recipe = swept(tree)
    trial = trial_recipe(recipe, "otpo", {REGS: 0.3}, "reg-0.3", RunFolder(Path("/runs/tiny")))
    assert list(trial.methods) == ["reg-0.3"]
    assert trial.method("reg-0.3").method.name == "otpo" and trial.method("reg-0.3").hyperparameters["reg"] == 0.3
    best = best_recipe(recipe, {REGS: 0.3})
    assert best.name == "tiny-best" and list(best.methods) == ["dpo", "otpo"] and not best.sweep.params
    assert best.method("otpo").hyperparameters["reg"] == 0.3


@pytest.mark.parametrize(
    ("workers", "gpus", "cpus", "judged", "expected"),
    [
        (2, 0, [2], True, (1, 1, True)),
        (2, 0, [8, 8], False, (4, 2, True)),  # four trials, eight workers
        (2, 0, [3, 3], False, (3, 1, True)),
        (4, 0, [3, 3, 3, 3], False, (3, 1, True)),
        (4, 0, [5, 5, 5], False, (3, 1, True)),
        (6, 0, [4, 4], False, (1, 1, True)),  # 8 // 6 would be 1; two workers a node of 4 would not make six
        (2, 8, [64], False, (4, 8, True)),
        (2, 8, [64], True, (3, 8, True)),  # one GPU stays the engine's
        (1, 1, [8], True, (1, 8, False)),  # training and the engine take turns
        (4, 4, [32], True, (1, 8, False)),
    ],
)
def test_the_cluster_is_divided_so_that_every_running_trial_has_its_workers(
    workers: int, gpus: int, cpus: list[int], judged: bool, expected: tuple[int, int, bool]
) -> None:
    from pipeline.cluster.placement import allocate_trials

    nodes = [{"CPU": count, "GPU": gpus} for count in cpus]
    engines, engine_gpus = int(judged), min(gpus, 1)
    found = allocate_trials(nodes, trials=4, workers=workers, engines=engines, engine_gpus=engine_gpus, on_gpu=gpus > 0)
    assert (found.concurrent, found.cpus, found.keep_engine) == expected


@pytest.mark.parametrize(
    ("nodes", "workers", "use_gpu", "expected"),
    [
        ([{"CPU": 64, "GPU": 8}], 2, "auto", (3, 8, True)),  # one GPU for the judge, one for the engine
        ([{"CPU": 64, "GPU": 4}], 2, "auto", (1, 16, True)),
        ([{"CPU": 8, "GPU": 2}], 1, "auto", (1, 4, False)),  # training and the engine take turns
        ([{"CPU": 8}], 1, "auto", (4, 2, True)),
        ([{"CPU": 8, "GPU": 1}], 1, "auto", r"judge\.vllm holds 1 GPU while .* no room for 1 training worker and"),
        ([{"CPU": 8, "GPU": 2}], 2, True, r"judge\.vllm holds 1 GPU while .* no room for 2 training workers"),
        ([{"CPU": 8, "GPU": 2}], 3, True, r"train\.workers is 3, but the cluster has 2 GPUs"),
    ],
)
def test_a_judge_that_vllm_serves_has_gpus_of_its_own_beside_trials(
    tree: dict[str, Any], nodes: list[dict[str, float]], workers: int, use_gpu: bool | str, expected: Any
) -> None:
    from pipeline.milestones.room import allocate

    recipe = swept(tree | {"judge": {"vllm": "folder"}})
    room = {"trainings": 4, "workers": workers, "use_gpu": use_gpu, "judged": True}
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            allocate(recipe, nodes, **room)
    else:
        found = allocate(recipe, nodes, **room)
        assert (found.concurrent, found.cpus, found.keep_engine) == expected


def test_a_best_step_is_judged_only_where_an_engine_fits_beside_training(tree: dict[str, Any]) -> None:
    from pipeline.milestones.room import check_judged_beside

    recipe = swept(tree | {"train": tree["train"] | {"use_gpu": "auto"}})
    check_judged_beside(recipe, [{"CPU": 8, "GPU": 2}], 1)
    check_judged_beside(recipe, [{"CPU": 2}], 1)
    with pytest.raises(UserError, match=r"no GPU for an engine beside the workers"):
        check_judged_beside(recipe, [{"CPU": 8, "GPU": 2}], 2)


def test_labels_that_are_scorers_become_their_trained_folders(tree: dict[str, Any]) -> None:
    tree["methods"] = {"dpo": {}, "otpo": {}, "tgdpo": {"oracle": "dpo"}, "sampo": {}}
    oracles = swept(tree, params={"methods.tgdpo.oracle": ["dpo", "otpo"]})
    assert plan(oracles)[0].label == "tgdpo" and frozen_labels(oracles, "tgdpo") == ["dpo", "otpo"]
    trial = trial_recipe(
        oracles, "tgdpo", {"methods.tgdpo.oracle": "otpo"}, "oracle-otpo", RunFolder(Path("/runs/tiny"))
    )
    assert trial.method("oracle-otpo").frozen_models == {"oracle": "/runs/tiny/models/otpo/model"}
    assert frozen_labels(swept(tree), "otpo") == []


def test_a_best_win_rate_comes_with_its_caution(tree: dict[str, Any], tmp_path: Path) -> None:
    from pipeline.sweep.results import read_outcomes, render, write_results
    from pipeline.sweep.search import Search

    def trial(reg: float, **end: Any) -> dict[str, Any]:
        return {"name": f"reg-{reg:g}", "params": {REGS: reg}, "state": "done"} | end

    def rate(value: float, half: float) -> dict[str, Any]:
        return {"figures": {"win_rate": value, "win_rate_low": value - half, "win_rate_high": value + half}}

    search = Search("otpo", {REGS: [0.1, 1.0, 3.0, 9.0]}, {"win_rate": "max"}, "facts", None, 4)
    trials = [trial(0.1, **rate(40, 3)), trial(1, **rate(52, 3)), trial(3, **rate(48, 3)),
              trial(9, state="failed", error="out of memory")]  # fmt: skip
    (outcome,) = write_results(swept(tree), [search], SweepFolder(tmp_path), [trials])
    assert outcome.results["trial"].tolist() == ["reg-1", "reg-3", "reg-0.1", "reg-9"]
    assert (outcome.best, outcome.failed) == ("reg-1", 1)
    assert "intervals of 1 other" in str(outcome.caution) and "optimistic" in str(outcome.caution)
    assert load_recipe(tmp_path / "best.yaml").method("otpo").hyperparameters["reg"] == 1
    (again,) = read_outcomes(SweepFolder(tmp_path), [search])
    assert again.best == "reg-1" and not again.did and render(again).row_count == 4


def test_too_small_a_cluster_is_refused_before_anything_is_trained(
    tree: dict[str, Any], tmp_path: Path, ray_cluster: None
) -> None:
    from pipeline.sweep.sweep import sweep

    tree["train"]["workers"] = 64
    with pytest.raises(UserError, match=r"train\.workers"):
        sweep(swept(tree), tmp_path / "runs" / "tiny", world=None, progress=silent, say=silent)
    assert not (tmp_path / "runs" / "tiny" / "models").exists()


def test_two_trials_give_a_table_a_plot_and_a_recipe(tree: dict[str, Any], tmp_path: Path, ray_cluster: None) -> None:
    from pipeline.sweep.sweep import sweep

    said: list[str] = []
    folder = tmp_path / "runs" / "tiny"
    (outcome,) = sweep(swept(tree), folder, world=None, progress=silent, say=said.append)
    assert "2 trials, 2 at a time: each has 1 training worker with 1 CPU." in said

    # the objective is the last evaluation of each trial's own training, and the best is the smallest
    losses = {}
    for name in ("reg-0.1", "reg-1"):
        lines = (folder / "sweep" / "models" / name / "metrics.jsonl").read_text().splitlines()
        evaluations = [json.loads(line) for line in lines if "eval_loss" in line]
        assert [line["step"] for line in evaluations] == [2, 4]
        losses[name] = evaluations[-1]["eval_loss"]
    results = pd.read_csv(folder / "sweep" / "results.csv")
    assert dict(zip(results["trial"], results["eval_loss"], strict=True)) == pytest.approx(losses)
    assert losses["reg-0.1"] != losses["reg-1"]
    assert outcome.best == min(losses, key=losses.__getitem__) == results["trial"][0]
    assert (folder / "sweep" / "plot.svg").read_text().lstrip().startswith("<?xml")
    assert "reg-0.1" in (folder / "sweep" / "report.html").read_text()
    best = load_recipe(folder / "sweep" / "best.yaml")
    assert best.method("otpo").hyperparameters["reg"] == {"reg-0.1": 0.1, "reg-1": 1.0}[outcome.best]
    # the reference was computed once, although both trials began at the same time: no row is in two parts of its cache
    from pipeline.train.frozen_cache import FrozenLogProbs

    (cache,) = (tmp_path / "runs" / "scorers").iterdir()
    assert sum(len(part.keys) for part in FrozenLogProbs(cache).rows.parts) == 24

    # again: nothing is done
    written = (folder / "sweep" / "results.csv").stat().st_mtime_ns
    assert not sweep(swept(tree), folder, world=None, progress=silent, say=silent)[0].did
    assert (folder / "sweep" / "results.csv").stat().st_mtime_ns == written

    def queues() -> list[psutil.Process]:
        found = psutil.Process().children(recursive=True)
        return [process for process in found if "ray::JudgingQueue" in " ".join(process.cmdline())]

    until = time.monotonic() + 30
    while queues() and time.monotonic() < until:
        time.sleep(0.1)
    assert not queues(), "a sweep's queue outlives it"


@pytest.mark.slow
def test_of_one_more_value_only_that_one_is_trained(tree: dict[str, Any], tmp_path: Path, ray_cluster: None) -> None:
    from pipeline.sweep.sweep import sweep

    folder = tmp_path / "runs" / "tiny"
    (first,) = sweep(swept(tree), folder, world=None, progress=silent, say=silent)
    losses = dict(zip(first.results["trial"], first.results["eval_loss"], strict=True))
    trained = (folder / "sweep" / "models" / "reg-1" / "model" / "model.safetensors").stat().st_mtime_ns
    (more,) = sweep(swept(tree, params={REGS: [0.1, 1.0, 3.0]}), folder, world=None, progress=silent, say=silent)
    assert len(more.results) == 3 and more.failed == 0
    assert (folder / "sweep" / "models" / "reg-1" / "model" / "model.safetensors").stat().st_mtime_ns == trained
    assert losses.items() <= dict(zip(more.results["trial"], more.results["eval_loss"], strict=True)).items()


@pytest.mark.slow
def test_a_scorer_is_trained_once_before_the_trials(tree: dict[str, Any], tmp_path: Path, ray_cluster: None) -> None:
    from pipeline.sweep.sweep import sweep

    tree["methods"] = {"sampo": {}, "dpo": {}, "tgdpo": {"oracle": "dpo"}}
    folder = tmp_path / "runs" / "tiny"
    params = {"methods.tgdpo.beta": [0.1, 0.5]}
    (outcome,) = sweep(swept(tree, params=params), folder, world=None, progress=silent, say=silent)
    assert outcome.failed == 0 and len(outcome.results) == 2
    stages = json.loads((folder / "manifest.json").read_text())["stages"]
    assert "train/dpo" in stages and "train/sampo" not in stages and "train/tgdpo" not in stages
    # caches by model: the reference, and the oracle
    assert len(list((tmp_path / "runs" / "scorers").iterdir())) == 2
