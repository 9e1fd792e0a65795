"""Every shipped recipe finds room in the pools of every shipped cluster file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from support.pools import RECIPES, Pool, nodes_at_start, read_recipe, shipped

from eval.judge.config import JudgeConfig
from otpo.errors import UserError
from pipeline.cluster.placement import TrainingRoom, engine_demands
from pipeline.recipe.recipe import Recipe
from pipeline.run.room import find_room

POOLS = shipped()
LARGEST = next(path for path in RECIPES if path.stem == "llama3_8b_otpo")


def said(recipe: Recipe, pools: list[Pool]) -> list[tuple[str, str]]:
    """What a run of the recipe says of the cluster as it starts, with every node that it may still get in mind."""
    groups = [recipe.train] + ([recipe.train_of("base")] if recipe.base else [])
    return find_room(recipe, nodes_at_start(pools), groups, generates=True, grows=True)


def changed(recipe: Recipe, section: str, **values: Any) -> Recipe:
    return recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})


@pytest.mark.parametrize("file", POOLS)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_fits(path: Path, file: str) -> None:
    """All its workers have a GPU each, and all its engines start at once: some of them on idle training GPUs."""
    recipe, gpu_gb = read_recipe(path)
    assert said(recipe, POOLS[file]) == []
    room = TrainingRoom.of(nodes_at_start(POOLS[file]))
    assert room.pool and room.check(recipe.train.workers, use_gpu=True)
    (train,) = (pool for pool in POOLS[file] if pool.name == "train")
    assert train.gpu_gb is None or gpu_gb <= train.gpu_gb


def test_recipes_that_name_their_gpus_are_read() -> None:
    assert {path.stem: read_recipe(path)[1] for path in RECIPES if "published" in path.read_text()} == {
        "llama3_8b_otpo": 80,
        "llama32_3b_otpo": 80,
    }


@pytest.mark.parametrize("file", POOLS)
@pytest.mark.parametrize(
    ("section", "values", "refusal"),
    [
        ("train", {"workers": 16}, r"train\.workers is 16, but the cluster has [48] GPUs for training"),
        ("generate", {"tensor_parallel_size": 16}, r"engines of 16 GPUs .* largest node has [48]"),
    ],
)
def test_a_planted_misfit_is_refused(file: str, section: str, values: dict[str, int], refusal: str) -> None:
    recipe, _ = read_recipe(LARGEST)
    with pytest.raises(UserError, match=refusal):
        said(changed(recipe, section, **values), POOLS[file])


def test_engines_that_wait_for_nodes_are_told() -> None:
    recipe, _ = read_recipe(LARGEST)
    ((what, sentence),) = said(changed(recipe, "generate", workers=6), POOLS["jobs/rayjob.yaml"])
    assert what == "engines" and sentence.startswith("5 of 6 engines") and sentence.endswith("wait for nodes to come")


@pytest.mark.parametrize("file", POOLS)
def test_engines_have_the_nodes_set_apart_for_them_beside_training(file: str) -> None:
    """As a sweep wants it: with as many nodes as the file allows, every shipped recipe's engines fit beside trials."""
    most = [dataclasses.replace(pool, nodes=(pool.nodes[1], pool.nodes[1])) for pool in POOLS[file]]
    for path in RECIPES:
        generate = read_recipe(path)[0].generate
        size = generate.tensor_parallel_size
        found = engine_demands(generate.workers, size, nodes_at_start(most), on_training_nodes=False)
        assert found == [{"generate": size}] * generate.workers


@pytest.mark.parametrize("pool", [{}, {"generate": 4.0}])
def test_gpus_without_bf16_are_no_place_for_engines_in_it(pool: dict[str, float]) -> None:
    """vLLM refuses them, and would do so only after training."""
    recipe, _ = read_recipe(LARGEST)
    recipe = changed(recipe, "train", workers=4)
    train = {"CPU": 32.0, "GPU": 4.0, "accelerator_type:H100": 1.0} | ({"train": 4.0} if pool else {})
    nodes = [train, {"CPU": 32.0, "GPU": 4.0, "accelerator_type:T4": 1.0} | pool]

    def room(recipe: Recipe, nodes: list[dict[str, float]]) -> list[tuple[str, str]]:
        return find_room(recipe, nodes, [recipe.train], generates=True, grows=False)

    with pytest.raises(UserError, match=r"bf16 on GPUs \(generate\.dtype=auto\), and vLLM has no bf16 on T4"):
        room(recipe, nodes)
    for values in ({"dtype": "fp32"}, {"backend": "transformers"}):
        assert room(changed(recipe, "generate", **values), nodes) == []
    newer = nodes[1] | {"accelerator_type:L4": 1.0}
    newer.pop("accelerator_type:T4")
    assert room(recipe, [train, newer]) == []


def test_a_judge_that_vllm_serves_must_fit_a_node() -> None:
    recipe, _ = read_recipe(LARGEST)
    large = changed(recipe, "train", workers=4)
    served = JudgeConfig(vllm={"model": "org/judge", "tensor_parallel_size": 4, "data_parallel_size": 2})
    large = large.model_copy(update={"judge": served})
    nodes = [{"CPU": 32.0, "GPU": 4.0}]
    with pytest.raises(UserError, match=r"judge\.vllm\.tensor_parallel_size makes engines of 8 GPUs .*largest .* 4"):
        find_room(large, nodes, [large.train], generates=True, grows=False)
    assert find_room(large, [{"CPU": 32.0, "GPU": 8.0}], [large.train], generates=True, grows=False) == []
