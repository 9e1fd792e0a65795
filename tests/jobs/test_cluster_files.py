"""cluster.yaml against Ray's own schema and loader, rayjob.yaml against what this project and KubeRay need."""

from __future__ import annotations

import json
import re
import shlex
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import typer.main
import yaml

ROOT = Path(__file__).resolve().parents[2]
SECRET = re.compile(r"sk-[A-Za-z0-9]{8}|AKIA[0-9A-Z]{8}|BEGIN [A-Z ]*PRIVATE KEY|Bearer ")


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def job() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "jobs" / "rayjob.yaml").read_text())


def test_cluster_is_what_ray_up_takes(cluster: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(cluster, json.loads(schema.read_text()))
    validate_config(prepare_config(cluster))


def test_pools_differ_by_a_resource_and_the_head_takes_no_work(cluster: dict[str, Any], job: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    pools = {name: set(types[name]["resources"]) for name in types if name != cluster["head_node_type"]}
    assert pools == {"train": {"train"}, "generate": {"generate"}}
    assert sum(types[name]["max_workers"] for name in pools) <= cluster["max_workers"]

    spec = job["spec"]["rayClusterSpec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    found = {
        group["groupName"]: set(json.loads(json.loads(group["rayStartParams"]["resources"])))
        for group in spec["workerGroupSpecs"]
    }
    assert found == pools


def test_every_way_in_wants_a_token(cluster: dict[str, Any], job: dict[str, Any]) -> None:
    for command in (cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in command and "ray start" in command
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_job_runs_a_verb_of_ours_on_shared_storage_and_can_be_retried(job: dict[str, Any]) -> None:
    from jobs.cli import app

    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    program, verb, *arguments = shlex.split(job["spec"]["entrypoint"])
    assert program == "otpo" and verb in typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert job["spec"]["backoffLimit"] > 0 and job["spec"]["shutdownAfterJobFinishes"] is True
    pods = [job["spec"]["rayClusterSpec"]["headGroupSpec"], *job["spec"]["rayClusterSpec"]["workerGroupSpecs"]]
    for pod in pods:
        (container,) = pod["template"]["spec"]["containers"]
        (mount,) = container["volumeMounts"]
        assert all(word.startswith(mount["mountPath"]) for word in arguments if word.startswith("/"))


def test_versions_agree_with_the_project(job: dict[str, Any]) -> None:
    (pin,) = [line for line in requires("otpo-pipeline") or [] if line.startswith("ray[")]
    assert pin.endswith(f"=={job['spec']['rayClusterSpec']['rayVersion']}") and pin.endswith(ray.__version__)


@pytest.mark.parametrize("name", ["cluster.yaml", "jobs/rayjob.yaml"])
def test_no_key_material(name: str, job: dict[str, Any]) -> None:
    assert not SECRET.search((ROOT / name).read_text())
    (head,) = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert all("value" not in variable and "secretKeyRef" in variable["valueFrom"] for variable in head["env"])
