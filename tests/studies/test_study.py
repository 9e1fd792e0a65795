"""The recipes of a study, and a tiny one on real Ray that is started twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from support.servers import ScriptedJudge
from support.sweeps import REGS, judged_tree, silent, sweep_tree

from otpo.errors import UserError
from pipeline.recipe import load_recipe, make_recipe
from pipeline.study.recipes import regimes, seed_recipe, tuned_values
from pipeline.sweep.search import plan
from pipeline.sweep.trial_recipes import best_recipe, of_label

LABELS = ["dpo", "otpo"]
RATE = "train.learning_rate"


@pytest.fixture
def tree(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    tree = sweep_tree(tiny_llama, tmp_path)
    tree["sweep"] |= {"label": LABELS, "params": {RATE: [1e-3, 1e-4]}}
    return tree | {"study": {"seeds": [1, 2]}}


def test_a_study_without_regimes_is_its_own(tree: dict[str, Any]) -> None:
    (regime,) = regimes(make_recipe(tree))
    assert (regime.name, regime.recipe.name, regime.labels) == ("tiny", "tiny", LABELS)


def test_regimes_change_the_recipe_and_have_folders_of_their_own(tree: dict[str, Any]) -> None:
    tree["study"]["regimes"] = {"plain": {}, "long": {"train.max_steps": 9, "methods": {"otpo": {"reg": 0.3}}}}
    plain, long = regimes(make_recipe(tree))
    assert (plain.recipe.name, long.recipe.name) == ("tiny-plain", "tiny-long")
    assert (plain.recipe.train.max_steps, long.recipe.train.max_steps) == (4, 9)
    assert long.recipe.method("otpo").hyperparameters["reg"] == 0.3
    assert plan(long.recipe)[0].n_trials == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"study": {"seeds": [1]}}, "at least 2"),
        ({"study": {"seeds": [1, 1]}}, "each once"),
        ({"study": {"seeds": [1, 42]}}, r"tuned with seed 42 \(train\.seed"),
        ({"study": {"seeds": [1, 2], "regimes": {"x": {"train.maxsteps": 3}}}}, r"study\.regimes\.x.*\n.*max_steps"),
        ({"study": {"seeds": [1, 2], "regimes": {"a b": {}}}}, "becomes a folder"),
        ({"sweep": {}}, "sweep.params is empty"),
    ],
)
def test_a_study_that_would_not_compare_fairly_is_refused(
    tree: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        regimes(make_recipe(tree | changes))


def test_a_seed_has_the_tuned_values_of_each_label_and_the_seed_everywhere(tree: dict[str, Any]) -> None:
    tree["world"], tree["methods"]["dpo"] = {"seed": 0, "entities": 30}, {"seed": 42}
    (regime,) = regimes(make_recipe(tree))
    best = of_label({RATE: 1e-4}, "dpo") | of_label({RATE: 1e-3, REGS: 0.5}, "otpo")
    tuned = best_recipe(regime.recipe, best)
    made = seed_recipe(regime.recipe, tuned, 2)
    assert made.name == "tiny-seed-2" and made.world == {"seed": 2, "entities": 30}
    assert [made.train_of(label).seed for label in LABELS] == [2, 2]
    assert [made.train_of(label).learning_rate for label in LABELS] == [1e-4, 1e-3]
    assert made.method("otpo").hyperparameters["reg"] == 0.5 and not made.sweep.params
    assert tuned_values(regime, tuned) == {"dpo": {"learning_rate": 1e-4}, "otpo": {"learning_rate": 1e-3}}
    with pytest.raises(UserError, match=r"world\.seed"):
        regimes(make_recipe(tree | {"study": {"seeds": [0, 1]}}))


def test_the_shipped_study_tunes_five_methods_alike_in_two_regimes() -> None:
    recipe = load_recipe("study")
    assert len(recipe.study.seeds) >= 5
    found = regimes(recipe)
    assert [regime.name for regime in found] == ["plain", "long"]
    for regime in found:
        searches = plan(regime.recipe)
        assert [search.label for search in searches] == ["dpo", "sampo", "ld-dpo", "simpo", "otpo"]
        assert {search.n_trials for search in searches} == {recipe.sweep.num_samples}
        own = {search.label: [key.split(".")[-1] for key in search.space] for search in searches}
        assert own.pop("otpo") == ["learning_rate", "beta", "reg"]
        assert set(map(tuple, own.values())) == {("learning_rate", "beta")}
    plain, long = (regime.recipe.world or {} for regime in found)
    assert "length_liking" not in plain and long["length_liking"] > 5


@pytest.mark.slow
def test_a_tiny_study_compares_tuned_labels_over_seeds_and_is_done_once(
    tiny_llama: Path, tmp_path: Path, ray_cluster: None
) -> None:
    from pipeline.study.study import study

    with ScriptedJudge() as judge:
        tree = judged_tree(tiny_llama, tmp_path, judge.url)
        tree["sweep"] = {"label": LABELS, "params": {RATE: [1e-3, 1e-4]}}
        tree["study"] = {"seeds": [1, 2], "regimes": {"short": {}, "longer": {"generate.max_tokens": 12}}}
        runs, arguments = tmp_path / "runs", {"world_of": lambda recipe: None, "progress": silent, "say": silent}
        done = study(make_recipe(tree), runs, **arguments)
        calls = len(judge.calls)
        again = study(make_recipe(tree), runs, **arguments)
        assert done.did and not again.did and len(judge.calls) <= calls + 12  # probes alone, one or two a run
    assert again.text == done.text == (runs / "tiny" / "study.md").read_text()
    names = {path.name for path in runs.iterdir()} - {"scorers"}
    of_regime = {f"tiny-{regime}{part}" for regime in ("short", "longer") for part in ("", "-seed-1", "-seed-2")}
    assert names == {"tiny", *of_regime}
    table = pd.read_csv(runs / "tiny" / "study.csv")
    rates = table[table["figure"] == "sums: win_rate"]
    assert len(rates) == 2 * 2 * 2 and set(rates["seed"]) == {1, 2} and set(rates["label"]) == set(LABELS)
    for row in rates.to_dict("records"):
        board = pd.read_csv(runs / f"tiny-{row['regime']}-seed-{row['seed']}" / "leaderboard.csv")
        assert row["value"] == board.set_index("name")["win_rate"][row["label"]]
    for regime in ("short", "longer"):
        best = load_recipe(runs / f"tiny-{regime}" / "sweep" / "best.yaml")
        ran = load_recipe(runs / f"tiny-{regime}-seed-2" / "recipe.yaml")
        assert [ran.train_of(label).learning_rate for label in LABELS] == [
            best.train_of(label).learning_rate for label in LABELS
        ]
