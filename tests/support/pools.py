"""The pools of nodes that the shipped cluster files offer, and what of a recipe does not fit them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.recipe.files import load_recipe
from pipeline.recipe.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "jobs" / "recipes").glob("*.yaml"))

# (GPUs, GB of memory each) of a machine of AWS, as its pages on instance types give them. Ray asks EC2 for the former.
INSTANCES = {"m7i.2xlarge": (0, 0), "p5.48xlarge": (8, 80), "g6e.2xlarge": (1, 48)}


@dataclass(frozen=True)
class Pool:
    """Nodes of one kind.

    Attributes:
        name: the custom resource that tells them apart, "train" or "generate".
        nodes: how many there are at least and at most.
        gpus: of a node.
        units: of the custom resource that a node offers.
        gpu_gb: memory of a GPU; None where the file does not say.
        labels: Ray's, of each node.
    """

    name: str
    nodes: tuple[int, int]
    gpus: int
    units: int
    gpu_gb: int | None
    labels: dict[str, str]


def _pools(types: dict[str, Any], gpus: dict[str, tuple[int, int | None]]) -> list[Pool]:
    return [
        Pool(
            name=name,
            nodes=(kind["min_workers"], kind["max_workers"]),
            gpus=gpus[name][0],
            units=int(kind["resources"][name]),
            gpu_gb=gpus[name][1],
            labels=kind["labels"],
        )
        for name, kind in types.items()
        if name in ("train", "generate")
    ]


def pools_on_aws(cluster: dict[str, Any]) -> list[Pool]:
    """Of cluster.yaml."""
    types = cluster["available_node_types"]
    return _pools(types, {name: INSTANCES[kind["node_config"]["InstanceType"]] for name, kind in types.items()})


def pools_on_kubernetes(job: dict[str, Any]) -> list[Pool]:
    """Of jobs/rayjob.yaml, as Ray's autoscaler reads it."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = {"metadata": {"name": "otpo", "namespace": "default"}, "spec": job["spec"]["rayClusterSpec"]}
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    return _pools(types, {name: (int(kind["resources"].get("GPU", 0)), None) for name, kind in types.items()})


def shipped() -> dict[str, list[Pool]]:
    """File -> its pools."""
    return {
        "cluster.yaml": pools_on_aws(yaml.safe_load((ROOT / "cluster.yaml").read_text())),
        "jobs/rayjob.yaml": pools_on_kubernetes(yaml.safe_load((ROOT / "jobs" / "rayjob.yaml").read_text())),
    }


def nodes_at_start(pools: list[Pool]) -> list[dict[str, float]]:
    """What the nodes offer that a cluster starts with, as Ray tells it; 8 CPUs for each GPU."""
    return [
        {"CPU": 8 * pool.gpus, "GPU": pool.gpus, pool.name: pool.units} for pool in pools for _ in range(pool.nodes[0])
    ]


def read_recipe(path: Path) -> tuple[Recipe, int]:
    """A recipe, and the GB of GPU memory that its first lines ask for; 0 if they ask for none."""
    asked = re.search(r"(\d+) GPUs of (\d+) GB", path.read_text())
    recipe = load_recipe(path)
    assert asked is None or int(asked[1]) == recipe.train.workers, f"{path.name}: the comment and train.workers differ"
    return recipe, int(asked[2]) if asked else 0
