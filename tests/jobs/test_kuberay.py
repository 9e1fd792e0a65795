"""`otpo submit --kuberay`: a RayJob for a recipe, which KubeRay takes and whose pools the recipe fits."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import yaml
from support.command import otpo, refused
from support.pools import RECIPES, nodes_at_start, pools_on_kubernetes, read_recipe
from support.training import settings
from test_kuberay_rules import refusals

from jobs.kuberay import name_of, rayjob
from jobs.submission import prepare
from pipeline.cluster.placement import TrainingRoom
from pipeline.recipe import load_recipe, make_recipe
from pipeline.run.room import find_room


def made(recipe, **options):
    job = prepare(recipe, runs="/shared/runs", shared=[], python="python", redo=False)
    text = rayjob(job, **{"image": "r/otpo:1", "claim": "mine", "gpus_per_node": 8} | options)
    return list(yaml.safe_load_all(text)), text


@pytest.mark.parametrize("gpus_per_node", [1, 2, 8])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_gives_a_job_that_kuberay_takes_and_that_it_fits(path: Path, gpus_per_node: int):
    recipe, _ = read_recipe(path)
    (_, job), text = made(recipe, gpus_per_node=gpus_per_node)
    assert list(refusals(job)) == []
    assert "&" not in text and "*" not in text.replace("jobs/*", ""), "no anchors"
    pools = pools_on_kubernetes(job)
    nodes = [node for node in nodes_at_start(pools) if "train" in node]
    room = TrainingRoom.of(nodes)
    assert room.check(recipe.train.workers, use_gpu=True)
    assert all(node["GPU"] <= gpus_per_node for node in nodes)
    most = [pool.__class__(**vars(pool) | {"nodes": (pool.nodes[1], pool.nodes[1])}) for pool in pools]
    groups = [recipe.train] + ([recipe.train_of("base")] if recipe.base else [])
    assert find_room(recipe, nodes_at_start(most), groups, generates=True, grows=False) == []


def test_the_recipe_in_it_is_the_recipe(tmp_path):
    recipe, _ = read_recipe(RECIPES[0])
    (config, job), text = made(recipe)
    assert config["metadata"]["name"] == job["metadata"]["name"]
    (tmp_path / "recipe.yaml").write_text(config["data"]["recipe.yaml"])
    there = load_recipe(tmp_path / "recipe.yaml")
    assert (
        there.model_dump()
        == prepare(recipe, runs="/shared/runs", shared=[], python="python", redo=False).recipe.model_dump()
    )
    spec = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "recipe", "configMap": {"name": config["metadata"]["name"]}} in spec["volumes"]
    assert job["spec"]["entrypoint"] == "python -m jobs.rayjob run /recipe/recipe.yaml --runs /shared/runs"
    images = {line.strip() for line in text.splitlines() if "image:" in line}
    assert images == {"image: r/otpo:1"} and text.count("claimName: mine") == text.count("claimName:") == 3


def test_the_same_recipe_has_the_same_name_and_another_one_has_not():
    recipe, _ = read_recipe(RECIPES[0])

    def name(recipe, **changes):
        asked = {"runs": "/shared/runs", "shared": [], "python": "python", "redo": False} | changes
        return name_of(prepare(recipe, **asked))

    tree = recipe.model_dump(mode="json")
    longer = make_recipe(tree | {"name": "A_" + "x" * 90})
    assert name(recipe) == name(recipe)
    assert len({name(recipe), name(longer), name(recipe, verb="sweep"), name(recipe, redo=True)}) == 4
    assert len(name(longer)) <= 47


def test_training_on_cpus_asks_for_no_gpu(tmp_path, tiny_llama):
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {}})
    recipe = make_recipe(tree | {"model": {"path": "a/b"}, "data": {"path": "/shared/pairs.jsonl"}})
    (_, job), _ = made(recipe)
    train = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert "nvidia.com/gpu" not in str(train)
    (pool,) = (pool for pool in pools_on_kubernetes(job) if pool.name == "train")
    assert pool.units == recipe.train.workers == 2
    assert list(refusals(job)) == []


def test_pools_hold_the_base_too_and_nobody_pays_for_engines_that_are_not_asked_for():
    recipe, _ = read_recipe(next(path for path in RECIPES if path.stem == "llama3_8b_otpo"))
    tree = recipe.model_dump(mode="json")

    def pools(**sections):
        return pools_on_kubernetes(made(make_recipe(tree | sections))[0][1])

    (train, _) = pools(base={"data": "/shared/rows.jsonl", "workers": 8})
    assert (train.gpus, train.units, train.nodes) == (8, 8, (1, 1))
    (train, _) = pools(base={"data": "/shared/rows.jsonl"}, train=tree["train"] | {"use_gpu": False})
    assert train.gpus == 0
    assert [pool.name for pool in pools(generate={"tasks": {}})] == ["train"]


def test_a_judge_that_vllm_serves_finds_a_node_as_large_as_it_is():
    """Four engines of a GPU each then share nodes of four."""
    recipe, _ = read_recipe(next(path for path in RECIPES if path.stem == "llama3_8b_otpo"))
    judge = {"vllm": {"model": "a/b", "tensor_parallel_size": 2, "data_parallel_size": 2}}
    tree = recipe.model_dump(mode="json") | {"judge": judge}
    (_, job), _ = made(make_recipe(tree))
    (_, generate) = pools_on_kubernetes(job)
    assert (generate.gpus, generate.units, generate.nodes) == (4, 4, (1, 1))
    assert list(refusals(job)) == []


def test_a_scorer_with_a_key_of_its_own_gets_that_and_not_the_judges():
    recipe, _ = read_recipe(next(path for path in RECIPES if path.stem == "llama3_8b_otpo"))
    scorer = {"url": "https://scorer/v1", "model": "m", "api_key_env": "SCORER_KEY", "protocol": "rating"}
    tree = recipe.model_dump(mode="json") | {"data": {}, "pairs": {"prompts": "/shared/p.jsonl", "scorer": scorer}}
    (_, job), _ = made(make_recipe(tree))
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    found = {each["name"]: each.get("valueFrom", {}).get("secretKeyRef", {}).get("name") for each in head["env"]}
    assert found["SCORER_KEY"] == "otpo-scorer" and found["OPENAI_API_KEY"] == "otpo-judge"
    assert list(refusals(job)) == []


def test_each_judge_of_a_panel_gets_its_own_key_on_the_head():
    recipe, _ = read_recipe(next(path for path in RECIPES if path.stem == "llama3_8b_otpo"))
    tree = recipe.model_dump(mode="json")
    keys = ("OTHER_KEY", None, "THIRD_KEY", "OTHER_KEY")
    tree["judge"]["panel"] = [{"model": f"m{number}", "api_key_env": key} for number, key in enumerate(keys)]
    (_, job), _ = made(make_recipe(tree))
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    found = [(each["name"], each["valueFrom"]["secretKeyRef"]) for each in head["env"] if each["name"].endswith("_KEY")]
    assert [(name, source["name"], source["key"]) for name, source in found] == [
        ("OPENAI_API_KEY", "otpo-judge", "api-key"),
        ("OTHER_KEY", "otpo-panel", "OTHER_KEY"),
        ("THIRD_KEY", "otpo-panel", "THIRD_KEY"),
    ]
    assert list(refusals(job)) == []


@pytest.fixture
def recipe(tmp_path, tiny_llama) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path, tiny_llama, methods={"dpo": {}})))
    return path


def test_local_files_are_refused_with_the_way_out(tmp_path, recipe):
    done = otpo(tmp_path, "submit", recipe, "--kuberay", "--image", "r/otpo:1")
    refused(done, "Only the recipe travels", str(tmp_path / "pairs.json"), "below /shared")
    shared = otpo(tmp_path, "submit", recipe, "--kuberay", "--image", "r/otpo:1", "--shared", "/")
    assert shared.code == 0, shared.err
    assert len(list(yaml.safe_load_all(shared.out))) == 2


def test_what_is_missing_is_asked_for(tmp_path, recipe):
    refused(otpo(tmp_path, "submit", recipe, "--kuberay"), "--image", "docker build")
    words = ("submit", recipe, "--kuberay", "--image", "i", "--shared", "/")
    refused(otpo(tmp_path, *words, "--runs", "/data/runs"), "--runs /data/runs", "/shared/runs")
    refused(otpo(tmp_path, *words, "--runs", "/shared/../data"), "--runs /shared/../data", "/shared/runs")
    refused(otpo(tmp_path, *words, "--claim", "My_Claim"), "--claim 'My_Claim'", "volume claim")
    refused(otpo(tmp_path, *words, "judge.api_key_env=MY KEY"), "'MY KEY'", "environment variable")
    refused(otpo(tmp_path, *words[:4], "https://registry/otpo", *words[5:]), "--image 'https://registry/otpo'")
    refused(otpo(tmp_path, *words, "--apply", PATH=str(tmp_path)), "kubectl is not installed")
    refused(otpo(tmp_path, *words, "--follow"), "--follow is for Ray jobs, not for Kubernetes")
    refused(otpo(tmp_path, "submit", recipe, "--apply"), "--apply is for Kubernetes: add --kuberay")


def test_it_is_handed_to_kubectl(tmp_path, recipe):
    """A program of that name, which keeps what it is given; no cluster is at hand."""
    words = ("submit", recipe, "--kuberay", "--image", "i", "--shared", "/")
    program = tmp_path / "bin" / "kubectl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\ncat > {tmp_path}/given\necho created\n')
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    path = f"{program.parent}:{os.environ['PATH']}"
    printed = otpo(tmp_path, *words)
    done = otpo(tmp_path, *words, "--apply", PATH=path)
    assert done.code == 0 and "created" in done.out and "kubectl logs -f job/otpo-small-" in done.out, done.err
    assert (tmp_path / "words").read_text() == "apply -f -\n"
    assert (tmp_path / "given").read_text() == printed.out
    program.write_text("#!/bin/sh\necho 'no such namespace' >&2\nexit 1\n")
    failed = otpo(tmp_path, *words, "--apply", PATH=path)
    assert failed.code == 1 and "no such namespace" in failed.err and "Traceback" not in failed.err
