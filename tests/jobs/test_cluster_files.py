"""cluster.yaml against Ray's own schema and loader, rayjob.yaml against what this project and Kubernetes need."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import typer.main
import yaml
from support.pools import ROOT, pools_on_aws, pools_on_kubernetes

SECRET = re.compile(r"sk-[A-Za-z0-9]{8}|AKIA[0-9A-Z]{8}|hf_[A-Za-z0-9]{8}|BEGIN [A-Z ]*PRIVATE KEY|Bearer ")
FILES = ("cluster.yaml", "jobs/rayjob.yaml")


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def check_with_ray(cluster: dict[str, Any]) -> dict[str, Any]:
    """The file as `ray up` completes it, checked as `ray up` checks it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(cluster, json.loads(schema.read_text()))
    prepared = prepare_config(cluster)
    validate_config(prepared)
    return prepared


@pytest.fixture
def cluster() -> dict[str, Any]:
    return read("cluster.yaml")


@pytest.fixture
def job() -> dict[str, Any]:
    return read("jobs/rayjob.yaml")


def pods_of(job: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name of a group -> the spec of its pods."""
    spec = job["spec"]["rayClusterSpec"]
    groups = {"head": spec["headGroupSpec"], **{group["groupName"]: group for group in spec["workerGroupSpecs"]}}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def test_cluster_is_what_ray_up_takes(cluster: dict[str, Any]) -> None:
    check_with_ray(cluster)


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


def test_a_unit_of_a_pool_is_a_gpu_and_labels_name_it(cluster: dict[str, Any], job: dict[str, Any]) -> None:
    for pools in (pools_on_aws(cluster), pools_on_kubernetes(job)):
        assert [pool.name for pool in pools] == ["train", "generate"]
        for pool in pools:
            assert pool.units == pool.gpus > 0 and pool.labels["pool"] == pool.name


def test_idle_nodes_go(cluster: dict[str, Any], job: dict[str, Any]) -> None:
    """Engines may wait for nodes. Training may not (`check_workers`), so its pool keeps what it has."""
    assert 0 < cluster["idle_timeout_minutes"] <= 15 and cluster["provider"]["cache_stopped_nodes"] is False
    spec = job["spec"]["rayClusterSpec"]
    assert spec["enableInTreeAutoscaling"] is True and spec["autoscalerOptions"]["idleTimeoutSeconds"] <= 900
    for pools in (pools_on_aws(cluster), pools_on_kubernetes(job)):
        train, generate = pools
        assert 1 <= train.nodes[0] <= train.nodes[1]
        assert 1 <= generate.nodes[0] < generate.nodes[1]


def test_every_way_in_wants_a_token(cluster: dict[str, Any], job: dict[str, Any]) -> None:
    for command in (cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in command and "ray start" in command
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_machine_images_are_looked_up_for_the_region_of_the_file(tmp_path: Path) -> None:
    """Without an ImageId Ray takes an Ubuntu 18.04. The commands at the top put real ids in; `aws` is a stand-in."""
    text = (ROOT / "cluster.yaml").read_text()
    lines = text.splitlines()
    first = next(number for number, line in enumerate(lines) if "image() {" in line)
    last = next(number for number, line in enumerate(lines) if "> my-cluster.yaml" in line)
    script = "\n".join(line.removeprefix("#").strip() for line in lines[first : last + 1])
    (tmp_path / "cluster.yaml").write_text(text)
    aws = tmp_path / "aws"
    aws.write_text(
        '#!/bin/sh\necho "$@" >> asked\ncase "$*" in *canonical*) echo ami-0head;; *) echo ami-0gpu;; esac\n'
    )
    aws.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", script], cwd=tmp_path, env=environment, check=True)

    mine = yaml.safe_load((tmp_path / "my-cluster.yaml").read_text())
    types = check_with_ray(mine)["available_node_types"]
    images = {name: kind["node_config"]["ImageId"] for name, kind in types.items()}
    assert images == {"head": "ami-0head", "train": "ami-0gpu", "generate": "ami-0gpu"}
    asked = (tmp_path / "asked").read_text().splitlines()
    assert len(asked) == 2 and all(f"--region {mine['provider']['region']} " in line for line in asked)
    # names that Canonical and AWS publish for Ubuntu 24.04, whose Python is 3.12
    assert {line.split("--name ")[1].split()[0] for line in asked} == {
        "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id",
        "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id",
    }


def test_nodes_install_the_pinned_packages_and_nothing_of_rays_own(cluster: dict[str, Any]) -> None:
    prepared = check_with_ray(cluster)
    assert prepared["head_setup_commands"] == prepared["worker_setup_commands"] == cluster["setup_commands"]
    (install,) = [command for command in cluster["setup_commands"] if "pip install" in command]
    assert "--constraint" in install and "constraints-gpu.txt" in install and "[gpu,aws]" in install


def test_setup_stops_where_nothing_is_mounted(cluster: dict[str, Any]) -> None:
    (check,) = [command for command in cluster["setup_commands"] if command.startswith("mountpoint")]
    refused = subprocess.run(["bash", "-c", check.replace("/shared", "/nowhere", 1)], capture_output=True, text=True)
    assert refused.returncode == 1 and "Nothing is mounted at /shared" in refused.stderr
    assert subprocess.run(["bash", "-c", check.replace("/shared", "/proc", 1)]).returncode == 0


def test_every_node_reads_the_hub_and_only_the_head_asks_the_judge(
    cluster: dict[str, Any], job: dict[str, Any]
) -> None:
    for command in (cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]):
        assert "HF_HOME=/shared/" in command and "export HF_TOKEN=" in command
    assert ".judge" in cluster["head_start_ray_commands"][-1]
    assert ".judge" not in cluster["worker_start_ray_commands"][-1]

    for name, pod in pods_of(job).items():
        (container,) = pod["containers"]
        variables = {variable["name"]: variable for variable in container["env"]}
        assert variables["HF_HOME"]["value"].startswith("/shared/")
        assert variables["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["optional"] is True
        assert ("OPENAI_API_KEY" in variables) == (name == "head")


def test_every_pod_has_shared_memory_and_the_shared_volume(job: dict[str, Any]) -> None:
    for pod in pods_of(job).values():
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        shared, whole = (
            int(text.removesuffix("Gi"))
            for text in (mounts["/dev/shm"]["emptyDir"]["sizeLimit"], container["resources"]["limits"]["memory"])
        )
        assert 8 <= shared <= whole / 2  # it counts towards the container's memory
        assert "persistentVolumeClaim" in mounts["/shared"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert pod["securityContext"]["fsGroup"] == 1000  # the user of Dockerfile


def test_job_runs_a_verb_of_ours_on_shared_storage_and_can_be_retried(job: dict[str, Any]) -> None:
    from jobs.cli import app

    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    *program, verb, recipe, option, runs = shlex.split(job["spec"]["entrypoint"])
    assert program == ["python", "-m", "jobs.rayjob"]  # `otpo`, which stops the job where the input is wrong
    assert option == "--runs" and verb in typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert job["spec"]["backoffLimit"] > 0 and job["spec"]["shutdownAfterJobFinishes"] is True
    for pod in pods_of(job).values():
        mounted = [mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]]
        assert all(any(word.startswith(path) for path in mounted) for word in (recipe, runs))


def test_versions_agree_with_the_project(job: dict[str, Any]) -> None:
    (pin,) = [line for line in requires("otpo-pipeline") or [] if line.startswith("ray[")]
    assert pin.endswith(f"=={job['spec']['rayClusterSpec']['rayVersion']}") and pin.endswith(ray.__version__)
    images = {pod["containers"][0]["image"] for pod in pods_of(job).values()}
    assert images == {f"REGISTRY/otpo:{version('otpo-pipeline')}"}


@pytest.mark.parametrize("name", FILES)
def test_no_key_material(name: str, job: dict[str, Any]) -> None:
    assert not SECRET.search((ROOT / name).read_text())
    for pod in pods_of(job).values():
        variables = [variable for variable in pod["containers"][0]["env"] if variable["name"] != "HF_HOME"]
        assert all("value" not in variable and "secretKeyRef" in variable["valueFrom"] for variable in variables)


def test_spot_lines_work_when_uncommented() -> None:
    def uncommented(name: str, key: str) -> dict[str, Any]:
        text, count = re.subn(rf"^( *)# ({key}:)", r"\1\2", (ROOT / name).read_text(), flags=re.MULTILINE)
        assert count == 2  # both pools, not the head
        return yaml.safe_load(text)

    cluster = uncommented("cluster.yaml", "InstanceMarketOptions")
    types = check_with_ray(cluster)["available_node_types"]
    spot = {name for name, kind in types.items() if "InstanceMarketOptions" in kind["node_config"]}
    assert spot == {"train", "generate"}
    assert all(types[name]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for name in spot)

    job = uncommented("jobs/rayjob.yaml", "nodeSelector")
    assert {name for name, pod in pods_of(job).items() if "nodeSelector" in pod} == {"train", "generate"}
    assert pools_on_kubernetes(job) == pools_on_kubernetes(read("jobs/rayjob.yaml"))
