"""Every method trains through Ray from a recipe that names it, and frozen models that are labels are trained first."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from support.training import metrics, settings, write_pairs

from otpo.errors import UserError
from otpo.methods import FROZEN_MODELS, METHODS
from pipeline.recipe import make_recipe
from pipeline.run.run import RunResult, open_context, run
from pipeline.run.stages.base import base
from pipeline.run.stages.train import untrained
from pipeline.train.frozen_cache import FrozenLogProbs

TRAINED = {"oracle": "dpo", "positive": "dpo", "negative": "dispreferred"}


def recipe_of(folder: Path, model: Path, methods: dict, **train):
    tree = settings(
        folder, model, methods=methods, train={"max_steps": 3, "global_batch_size": 6, "workers": 1} | train
    )
    return make_recipe(tree)


def frozen_models_of(name: str) -> dict[str, str]:
    return {model: TRAINED[model] for model in FROZEN_MODELS if model in METHODS[name].needs}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama, ray_cluster) -> RunResult:
    """Every method, those that need frozen models first in the recipe."""
    folder = tmp_path_factory.mktemp("all")
    write_pairs(folder / "pairs.json", n=24)
    names = sorted(METHODS, key=lambda name: not frozen_models_of(name))
    methods = {name: frozen_models_of(name) for name in names}
    methods["dispreferred"] = {"method": "dpo", "swap_answers": True}
    methods["otpo-hinge"] = {"method": "hinge", "weights": "otpo", "reg": 0.03}
    recipe = recipe_of(folder, tiny_llama, methods)
    return run(recipe, folder / "runs" / "all", world=None, progress=lambda *_: None, until="train")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_from_its_name(trained, name):
    steps, _ = metrics(trained.folder.label(name).path)
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(math.isfinite(value) for line in steps for value in line.values())
    assert all(line["grad_norm"] > 0 for line in steps)
    assert (trained.folder.model(name) / "model.safetensors").exists()


@pytest.mark.slow
def test_another_rule_weights_the_tokens_of_a_loss(trained):
    plain, weighted = (metrics(trained.folder.label(name).path)[0] for name in ("hinge", "otpo-hinge"))
    assert weighted[0]["loss"] == plain[0]["loss"] == pytest.approx(1), "both start from the reference"
    assert weighted[0]["weights/effective_tokens_chosen"] < plain[0]["weights/effective_tokens_chosen"]
    assert "weights/transport_mass" in weighted[0]
    assert weighted[-1]["loss"] != pytest.approx(plain[-1]["loss"], abs=1e-6)


@pytest.mark.slow
def test_frozen_models_are_trained_first(trained):
    order = trained.recipe.training_order()
    assert all(order.index(s) < order.index(n) for n in METHODS for s in frozen_models_of(n).values())
    assert list(trained.recipe.methods).index("tgdpo") < list(trained.recipe.methods).index("dpo")


@pytest.mark.slow
def test_a_frozen_model_is_cached_once_for_all_methods_that_read_it(trained):
    """The reference, dpo (of three methods), the model of swapped completions; the reference of KTO's completions."""
    caches = [FrozenLogProbs(folder) for folder in (trained.folder.path.parent / "scorers").iterdir()]
    assert sorted(len(cache.rows) for cache in caches) == [24, 24, 24, 48]


@pytest.mark.slow
def test_swapped_completions_train_the_opposite_preference(trained):
    plain, swapped = (metrics(trained.folder.label(name).path)[0] for name in ("dpo", "dispreferred"))
    assert swapped[0]["lengths/chosen"] == plain[0]["lengths/rejected"] != plain[0]["lengths/chosen"]
    assert swapped[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-4), (
        "the first gradient is the opposite"
    )
    assert swapped[-1]["rewards/margins"] > 0 < plain[-1]["rewards/margins"]


@pytest.mark.slow
def test_what_is_trained_is_not_trained_again_and_a_changed_frozen_model_changes_what_reads_it(trained):
    again = run(trained.recipe, trained.folder.path, world=None, progress=lambda *_: None, until="train")
    assert again.did == []
    changed = trained.recipe.model_dump(mode="json")
    changed["methods"]["dispreferred"]["beta"] = 0.3
    other = open_context(make_recipe(changed), trained.folder.path, world=None, progress=lambda *_: None, redo=True)
    base(other)
    assert untrained(other) == ["dispreferred", "tis-dpo"]


@pytest.mark.slow
def test_two_workers_train_what_one_does(trained, tiny_llama):
    """TDPO's reference is sharded, its head is read in the policy's backward pass; AOT sorts all workers' pairs; KTO's
    KL term is of all workers' completions.
    """
    names = ["wpo", "tdpo1", "tdpo2", "aot", "kto"]
    recipe = recipe_of(trained.folder.path.parent.parent, tiny_llama, {name: {} for name in names}, workers=2)
    two = run(recipe, trained.folder.path.parent / "two", world=None, progress=lambda *_: None, until="train")
    for name in names:
        ours, theirs = (metrics(folder.label(name).path)[0] for folder in (two.folder, trained.folder))
        for key in ("loss", "grad_norm"):
            assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=1e-4)
        assert ours[-1]["loss"] != ours[0]["loss"], "warm-up takes the first step with a learning rate of 0"


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ({"tgdpo": {}}, ["methods.tgdpo.oracle"]),
        ({"tgdpo": {"oracle": "dpoo"}, "dpo": {}}, ["methods.tgdpo.oracle", "'dpoo' is no label", "tgdpo, dpo"]),
        ({"tgdpo": {"oracle": "tgdpo"}}, ["tgdpo -> tgdpo"]),
        (
            {"a": {"method": "tgdpo", "oracle": "b"}, "b": {"method": "sepo", "oracle": "a"}},
            ["wait for each other: a -> b -> a"],
        ),
    ],
)
def test_frozen_models_that_cannot_be_trained_are_refused(tmp_path, tiny_llama, methods, words):
    with pytest.raises(UserError) as error:
        recipe_of(tmp_path, tiny_llama, methods)
    assert all(word in str(error.value) for word in words)


def test_a_missing_frozen_model_is_refused_before_anything_starts(tmp_path, tiny_llama):
    recipe = recipe_of(tmp_path, tiny_llama, {"sepo": {"oracle": "./no/model"}})
    with pytest.raises(UserError, match=r"methods\.sepo\.oracle: there is no file or folder"):
        run(recipe, tmp_path / "run", world=None, progress=lambda *_: None, until="train")
