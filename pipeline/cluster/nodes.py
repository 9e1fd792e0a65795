"""Whether every node can do its part, found before anything starts: files that it sees, versions that it has."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from otpo.errors import UserError

SECONDS = 60.0  # for all nodes to answer
PACKAGES = ("torch", "transformers", "safetensors", "numpy")  # that must agree; Ray itself checks its own and Python's
SOURCES = ("otpo", "pipeline", "eval")


@dataclass(frozen=True)
class Sight:
    """What a node sees.

    Attributes:
        missing: paths that are not there.
        probe: content of the probe file; None where there is none.
        versions: package -> version; "otpo's code" -> a hash of it.
    """

    missing: list[str]
    probe: str | None
    versions: dict[str, str]


def check_nodes(folder: Path, paths: Mapping[str, str]) -> None:
    """Check that all nodes see the run's folder and the paths, and run the same code.

    Args:
        folder: of the run, which exists. A file is written there and read from every node.
        paths: key of the recipe -> absolute path that workers read.

    Raises:
        UserError: a node does not, which is named with the path or the package; or it does not answer.
    """
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(nodes) < 2:
        return
    probe, token = folder / f".seen-by-all-{os.getpid()}", uuid.uuid4().hex
    probe.write_text(token)
    try:
        look = ray.remote(num_cpus=0, max_retries=0)(see)
        asked: dict[Any, str] = {
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                str(probe), list(paths.values())
            ): address
            for node, address in nodes.items()
        }
        done, silent = ray.wait(list(asked), num_returns=len(asked), timeout=SECONDS)
        if silent:
            raise UserError(
                f"node {asked[silent[0]]} did not run a small task in {SECONDS:.0f} s. Look at it with `ray status`, or"
                " take it out of the cluster (`ray stop` there)."
            )
        here = versions()
        for reference in done:
            _compare(asked[reference], ray.get(reference), token, folder, paths, here)
    finally:
        probe.unlink(missing_ok=True)


def see(probe: str, paths: list[str]) -> Sight:
    """On a node: what it sees."""
    try:
        content = Path(probe).read_text()
    except OSError:
        content = None
    return Sight([path for path in paths if not Path(path).exists()], content, versions())


def versions() -> dict[str, str]:
    """What must be the same on every node."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    content, root = hashlib.sha256(), Path(__file__).resolve().parents[2]
    for name in SOURCES:
        for file in sorted((root / name).rglob("*.py")):
            content.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return found | {"otpo's code": content.hexdigest()[:12]}


def _compare(
    address: str, seen: Sight, token: str, folder: Path, paths: Mapping[str, str], here: dict[str, str]
) -> None:
    if seen.probe != token:
        raise UserError(
            f"node {address} does not see what this machine writes into {folder}. Runs must lie on storage that every"
            " node sees under the same path: give such a folder with --runs, or mount it there. Runs at an address such"
            " as s3://bucket/runs are worked on by one node alone."
        )
    if seen.missing:
        key = next(key for key, path in paths.items() if path == seen.missing[0])
        raise UserError(
            f"node {address} does not see {seen.missing[0]} ({key}). Put it on storage that every node sees under the"
            " same path, or copy it there."
        )
    differing = [
        f"{name} {seen.versions[name]} there, {here[name]} here" for name in here if seen.versions[name] != here[name]
    ]
    if differing:
        raise UserError(
            f"node {address} runs other versions: {'; '.join(differing)}. Install the same everywhere: numbers would"
            " depend on where a worker is placed."
        )
