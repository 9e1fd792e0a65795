"""Every shipped recipe finds room in the pools of every shipped cluster file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.pools import RECIPES, misfits, read_recipe, shipped

POOLS = shipped()
LARGEST = next(path for path in RECIPES if path.stem == "llama3_8b_otpo")


@pytest.mark.parametrize("file", POOLS)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_fits(path: Path, file: str) -> None:
    recipe, gpu_gb = read_recipe(path)
    assert not misfits(recipe, POOLS[file], gpu_gb)


def test_recipes_that_name_their_gpus_are_read() -> None:
    assert {path.stem: read_recipe(path)[1] for path in RECIPES if "published" in path.read_text()} == {
        "llama3_8b_otpo": 80,
        "llama32_3b_otpo": 80,
    }


@pytest.mark.parametrize("file", POOLS)
@pytest.mark.parametrize(
    ("section", "values", "found"),
    [
        ("train", {"workers": 16}, "train.workers 16"),
        ("generate", {"workers": 5}, "generate.workers 5 of 4"),
        ("generate", {"workers": 1, "tensor_parallel_size": 2}, "generate.workers 1 of 0, 2 GPUs each"),
    ],
)
def test_a_planted_misfit_is_found(file: str, section: str, values: dict[str, int], found: str) -> None:
    recipe, gpu_gb = read_recipe(LARGEST)
    changed = recipe.model_copy(update={section: getattr(recipe, section).model_copy(update=values)})
    (misfit,) = misfits(changed, POOLS[file], gpu_gb)
    assert misfit.startswith(found)


def test_a_gpu_with_too_little_memory_is_found() -> None:
    recipe, gpu_gb = read_recipe(LARGEST)
    assert misfits(recipe, POOLS["cluster.yaml"], gpu_gb + 1) == ["GPUs of 81 GB, there are 80 GB"]


def test_engines_may_ask_for_no_more_gpus_than_the_cluster_starts_with() -> None:
    recipe, _ = read_recipe(LARGEST)
    small = [
        dataclasses.replace(pool, nodes=(0, 4)) if pool.name == "generate" else pool
        for pool in POOLS["jobs/rayjob.yaml"]
    ]
    assert not misfits(recipe, small)
    five = recipe.model_copy(update={"generate": recipe.generate.model_copy(update={"workers": 5})})
    assert "generation asks for 5 GPUs, the cluster starts with 4" in misfits(five, small)
