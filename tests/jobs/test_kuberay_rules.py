"""jobs/rayjob.yaml against the rules by which KubeRay refuses a RayJob before anything starts.

The rules are those of `ValidateRayJobMetadata`, `ValidateRayJobSpec` and `ValidateRayClusterSpec` in
ray-operator/controllers/ray/utils/validation.go of ray-project/kuberay, the same in 1.6.0, 1.6.2 and 1.7.0, as far as
our file can break them; fields are those of ray-operator/apis/ray/v1. Each rule is shown to bite by a planted break.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from support.pools import ROOT

Tree = dict[str, Any]

# What each level may hold (json tags of rayjob_types.go and raycluster_types.go); the server refuses or drops the rest.
FIELDS = {
    "spec": "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint entrypointNumCpus"
    " entrypointNumGpus entrypointResources jobId managedBy metadata preRunningDeadlineSeconds rayClusterSpec"
    " runtimeEnvYAML shutdownAfterJobFinishes submissionMode submitterConfig submitterPodTemplate suspend"
    " ttlSecondsAfterFinished",
    "rayClusterSpec": "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec"
    " headServiceAnnotations managedBy rayVersion suspend upgradeStrategy workerGroupSpecs",
    "autoscalerOptions": "env envFrom idleTimeoutSeconds image imagePullPolicy resources securityContext upscalingMode"
    " version volumeMounts",
    "headGroupSpec": "enableIngress headService labels rayStartParams resources serviceType template",
    "workerGroupSpec": "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts rayStartParams replicas"
    " resources scaleStrategy suspend template",
}
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")


def refusals(job: Tree) -> Iterator[str]:
    """Why KubeRay would refuse the job."""
    spec, name = job["spec"], job["metadata"]["name"]
    cluster = spec["rayClusterSpec"]
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    levels = [("spec", spec), ("rayClusterSpec", cluster), ("autoscalerOptions", cluster.get("autoscalerOptions", {}))]
    levels += [("headGroupSpec", head), *(("workerGroupSpec", group) for group in workers)]
    for level, tree in levels:
        yield from (f"{level} has no field {key}" for key in tree.keys() - set(FIELDS[level].split()))

    if len(name) > 47 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield "metadata.name: at most 47 letters, digits and '-'"
    if spec.get("submissionMode", "K8sJobMode") not in MODES:
        yield f"submissionMode: one of {MODES}"
    if not spec.get("shutdownAfterJobFinishes") and spec.get("ttlSecondsAfterFinished", 0) > 0:
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if spec.get("backoffLimit", 0) < 0 or spec.get("activeDeadlineSeconds", 1) <= 0:
        yield "backoffLimit and activeDeadlineSeconds are positive"
    if spec.get("backoffLimit", 0) > 0 and (
        spec.get("clusterSelector") or spec.get("submissionMode") == "InteractiveMode"
    ):
        yield "backoffLimit goes with neither clusterSelector nor InteractiveMode"
    if (cluster.get("authOptions") or {}).get("mode") == "token":
        version = [int(part) for part in re.findall(r"\d+", cluster.get("rayVersion", ""))[:2]]
        if version < [2, 52]:
            yield "authOptions.mode token needs rayVersion 2.52.0 or later"

    scales = bool(cluster.get("enableInTreeAutoscaling"))
    second = scales and (cluster.get("autoscalerOptions") or {}).get("version") == "v2"
    for group in (head, *workers):
        where = group.get("groupName", "head")
        pod, start = group["template"]["spec"], group["rayStartParams"]
        if not pod.get("containers"):
            yield f"{where}: at least one container"
        if group.get("resources") and start.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
            yield f"{where}: resources stand in rayStartParams or in the group, not in both"
        if "labels" in start:
            yield f"{where}: rayStartParams['labels'] is not supported, labels stand in the group"
        if not all(LABEL.fullmatch(str(word)) for pair in group.get("labels", {}).items() for word in pair):
            yield f"{where}: labels as Kubernetes writes them"
        if second and pod.get("restartPolicy", "Never") != "Never":
            yield f"{where}: restartPolicy is Never with autoscaler v2"
        if any(variable["name"] == "RAY_enable_autoscaler_v2" for c in pod["containers"] for variable in c["env"]):
            yield f"{where}: autoscalerOptions.version says which autoscaler, not RAY_enable_autoscaler_v2"
    for group in workers:
        where, least, most = group["groupName"], group.get("minReplicas"), group.get("maxReplicas")
        if not scales and (least is None or most is None):
            yield f"{where}: minReplicas and maxReplicas are needed without autoscaling"
        if min(least or 0, most or 0) < 0 or (least is not None and most is not None and least > most):
            yield f"{where}: 0 <= minReplicas <= maxReplicas"
        if "idleTimeoutSeconds" in group and not second:
            yield f"{where}: idleTimeoutSeconds needs autoscaler v2"


@pytest.fixture
def job() -> Tree:
    # through JSON, so that groups share no anchors and a planted break changes one of them
    return json.loads(json.dumps(yaml.safe_load((ROOT / "jobs" / "rayjob.yaml").read_text())))


def test_kuberay_takes_the_job(job: Tree) -> None:
    assert list(refusals(job)) == []


def train(job: Tree) -> Tree:
    return job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]


def cluster_of(job: Tree) -> Tree:
    return job["spec"]["rayClusterSpec"]


BREAKS: list[tuple[Callable[[Tree], object], str]] = [
    (lambda job: job["metadata"].update(name="Otpo"), "metadata.name"),
    (lambda job: job["metadata"].update(name="o" * 48), "metadata.name"),
    (lambda job: job["spec"].update(podFailurePolicy={}), "spec has no field podFailurePolicy"),
    (lambda job: job["spec"].update(submissionMode="SshMode"), "submissionMode"),
    (lambda job: job["spec"].update(shutdownAfterJobFinishes=False), "ttlSecondsAfterFinished needs"),
    (lambda job: job["spec"].update(backoffLimit=-1), "positive"),
    (lambda job: job["spec"].update(activeDeadlineSeconds=0), "positive"),
    (lambda job: job["spec"].update(submissionMode="InteractiveMode"), "InteractiveMode"),
    (lambda job: cluster_of(job).update(rayVersion="2.51.1"), "2.52.0"),
    (lambda job: cluster_of(job).pop("rayVersion"), "2.52.0"),
    (lambda job: cluster_of(job)["autoscalerOptions"].update(idleTimeoutMinutes=5), "idleTimeoutMinutes"),
    (lambda job: train(job)["template"]["spec"].update(containers=[]), "at least one container"),
    (lambda job: train(job).update(resources={"train": "4"}), "not in both"),
    (lambda job: train(job)["rayStartParams"].update(labels="pool=train"), "labels stand in the group"),
    (lambda job: train(job).update(labels={"pool": "for training"}), "as Kubernetes writes"),
    (lambda job: train(job)["template"]["spec"].update(restartPolicy="Always"), "restartPolicy is Never"),
    (lambda job: train(job).update(minReplicas=2), "minReplicas <= maxReplicas"),
    (lambda job: train(job).update(minReplicas=-1), "minReplicas <= maxReplicas"),
]


@pytest.mark.parametrize(("plant", "refused"), BREAKS)
def test_a_planted_break_is_refused(job: Tree, plant: Callable[[Tree], object], refused: str) -> None:
    plant(job)
    found = list(refusals(job))
    assert len(found) == 1 and refused in found[0]


def test_rules_of_the_autoscaler_hold_only_where_it_is_the_second(job: Tree) -> None:
    train(job)["idleTimeoutSeconds"] = 60
    assert list(refusals(job)) == []
    cluster_of(job)["autoscalerOptions"]["version"] = "v1"
    (refused,) = refusals(job)
    assert "idleTimeoutSeconds needs autoscaler v2" in refused
    cluster_of(job)["enableInTreeAutoscaling"] = False
    train(job).pop("idleTimeoutSeconds")
    train(job).pop("minReplicas")
    (refused,) = refusals(job)
    assert "needed without autoscaling" in refused
