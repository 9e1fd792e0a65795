"""A recipe as a RayJob of Kubernetes: `otpo submit RECIPE --kuberay` prints it, `--apply` hands it to kubectl.

The cluster is that of `rayjob.yaml` beside this file, with pools of the sizes that the recipe asks for. The recipe
travels in a ConfigMap; data and models lie on the volume.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import yaml

from eval import layout
from eval.judge.panels.members import members_of
from jobs.submission import Submission
from otpo.errors import UserError, WorkError
from pipeline.recipe import Recipe, dump_yaml

TEMPLATE = Path(__file__).with_name("rayjob.yaml")
VOLUME = "/shared"  # where the template mounts it
RECIPE = "/recipe"
SCORER_SECRET = "otpo-scorer"  # with the key of `pairs.scorer`, where that is another than the judge's
PANEL_SECRET = "otpo-panel"  # with the keys of a panel's further judges, each under the name of its variable
LONGEST_NAME = 47  # KubeRay adds to it, and Kubernetes allows 63 letters
# What Kubernetes takes. It finds out only when it makes the pods, and a job then waits for them without a word.
PART = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
IMAGE = re.compile(
    rf"(?:[A-Za-z0-9][A-Za-z0-9.-]*(?::\d+)?/)?{PART}(?:/{PART})*(?::\w[\w.-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?"
)
CLAIM = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
CPUS, MEMORY_GIB, SHM_GIB = 8, 64, 24  # of a node for each of its GPUs, or of its workers on CPUs; as in the template


def rayjob(submission: Submission, *, image: str, claim: str, gpus_per_node: int) -> str:
    """The YAML of a ConfigMap with the recipe and of a RayJob that runs it. The same recipe gives the same names.

    Args:
        image: of every pod; what `Dockerfile` builds.
        claim: the volume claim that is mounted at `/shared`.
        gpus_per_node: of the nodes that train, at most.

    Raises:
        UserError: local files that would have to travel, runs that are not kept on the volume, or a name that
            Kubernetes does not take.
    """
    if submission.inputs:
        files = ", ".join(str(path) for path in submission.inputs.values())
        raise UserError(
            f"Only the recipe travels to Kubernetes, and it names {files}. Copy these to the volume, below {VOLUME}"
            f" there, and name them by that path; --shared DIR says that a folder has the same path on both."
        )
    runs = Path(submission.runs)
    if not runs.is_relative_to(VOLUME) or ".." in runs.parts:
        raise UserError(f"--runs {submission.runs}: expected a folder of the volume, such as {VOLUME}/runs.")
    for option, pattern, value, example in (
        ("--image", IMAGE, image, "the name of an image, such as registry.example.com/otpo:0.1.0"),
        ("--claim", CLAIM, claim, "the name of a volume claim, of small letters, digits, '-' and '.'"),
    ):
        if not pattern.fullmatch(value):
            raise UserError(f"{option} '{value}': expected {example}.")
    name, job = name_of(submission), yaml.safe_load(TEMPLATE.read_text())
    job["metadata"]["name"] = name
    words = ["python", "-m", "jobs.rayjob", submission.verb, f"{RECIPE}/{layout.RECIPE}", "--runs", submission.runs]
    job["spec"]["entrypoint"] = shlex.join([*words, *(["--redo"] if submission.redo else [])])
    cluster = job["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    head["volumes"].append({"name": "recipe", "configMap": {"name": name}})
    container = head["containers"][0]
    container["volumeMounts"] = [*container["volumeMounts"], {"name": "recipe", "mountPath": RECIPE}]
    key = next(variable for variable in container["env"] if variable["name"] == "OPENAI_API_KEY")
    key["name"] = submission.recipe.judge.api_key_env
    pairs = submission.recipe.pairs
    if pairs is not None and pairs.scorer.url and pairs.scorer.api_key_env != key["name"]:
        scorer = copy.deepcopy(key) | {"name": pairs.scorer.api_key_env}
        scorer["valueFrom"]["secretKeyRef"]["name"] = SCORER_SECRET
        container["env"] = [*container["env"], scorer]
    judges = [submission.recipe.judge, *([pairs.scorer] if pairs is not None else [])]
    for name_of_key in dict.fromkeys(each.api_key_env for config in judges for each in members_of(config)[1:]):
        if name_of_key not in {variable["name"] for variable in container["env"]}:
            source = {"name": PANEL_SECRET, "key": name_of_key, "optional": True}
            container["env"] = [*container["env"], {"name": name_of_key, "valueFrom": {"secretKeyRef": source}}]
    for variable in container["env"]:
        if not VARIABLE.fullmatch(variable["name"]):
            raise UserError(
                f"api_key_env '{variable['name']}': expected the name of an environment variable, of letters, digits"
                " and '_'."
            )
    pools = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    cluster["workerGroupSpecs"] = _pools(pools, submission.recipe, gpus_per_node, train_only=submission.verb == "train")
    for spec in [head, *(group["template"]["spec"] for group in cluster["workerGroupSpecs"])]:
        spec["containers"][0]["image"] = image
        for volume in spec["volumes"]:
            if volume["name"] == "shared":
                volume["persistentVolumeClaim"]["claimName"] = claim
    recipe = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}}
    recipe["data"] = {layout.RECIPE: dump_yaml(submission.recipe)}
    return yaml.dump_all([_plain(recipe), _plain(job)], Dumper=_Dumper, sort_keys=False, width=120)


def name_of(submission: Submission) -> str:
    """The name of a recipe's RayJob: its own name, as far as Kubernetes allows, and a part of the submission's hash."""
    digest = hashlib.sha256(submission.id.encode()).hexdigest()[:8]
    plain = re.sub(r"[^a-z0-9]+", "-", submission.recipe.name.lower()).strip("-")
    return f"{f'otpo-{plain}'[: LONGEST_NAME - 9].rstrip('-')}-{digest}"


def _pools(template: dict[str, Any], recipe: Recipe, gpus_per_node: int, *, train_only: bool) -> list[Any]:
    """The template's pools in the sizes that a recipe asks for."""
    groups = [recipe.train, *([recipe.train_of("base")] if recipe.base else [])]
    workers, gpu = max(group.workers for group in groups), any(group.use_gpu is not False for group in groups)
    nodes = math.ceil(workers / gpus_per_node)
    train = _sized(template["train"], math.ceil(workers / nodes), gpu=gpu)
    train |= {"replicas": nodes, "minReplicas": nodes, "maxReplicas": nodes}
    if train_only or not (recipe.generate.tasks or recipe.pairs):
        return [train]
    each, engines = recipe.generate.tensor_parallel_size, recipe.generate.workers
    judges = [recipe.judge, *([recipe.pairs.scorer] if recipe.pairs else [])]
    # a judge that vllm serves stays within a node, as an engine does
    size = max([each, *(judge.vllm.gpus for judge in judges if judge.vllm)])
    generate = _sized(template["generate"], size, gpu=True)
    generate |= {"maxReplicas": max(1, math.ceil(engines / (size // each)))}
    return [train, generate]


def _sized(pool: dict[str, Any], units: int, *, gpu: bool) -> dict[str, Any]:
    """A pool whose nodes have `units` GPUs each, or take as many workers on CPUs."""
    pool = copy.deepcopy(pool)
    pool["rayStartParams"] = {"resources": json.dumps(json.dumps({pool["groupName"]: units}))}
    spec = pool["template"]["spec"]
    amounts = {"cpu": str(CPUS * units), "memory": f"{MEMORY_GIB * units}Gi"}
    amounts |= {"nvidia.com/gpu": str(units)} if gpu else {}
    spec["containers"][0]["resources"] = {"requests": amounts, "limits": amounts}
    next(v for v in spec["volumes"] if v["name"] == "memory")["emptyDir"]["sizeLimit"] = f"{SHM_GIB * units}Gi"
    return pool


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such, so that the recipe can be read."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _plain(tree: Any) -> Any:
    """A tree in which nothing stands twice: YAML would write references, which people do not expect in a manifest."""
    return json.loads(json.dumps(tree))


def apply(manifest: str) -> str:
    """Hand a manifest to kubectl.

    Returns:
        What kubectl said.

    Raises:
        UserError: there is no kubectl here.
        WorkError: it refused.
    """
    try:
        done = subprocess.run(["kubectl", "apply", "-f", "-"], input=manifest, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise UserError(
            "kubectl is not installed here, or not on PATH. Leave --apply away: the manifest is printed, and"
            " `kubectl apply -f FILE` takes it elsewhere."
        ) from error
    if done.returncode:
        raise WorkError(f"kubectl apply: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()
