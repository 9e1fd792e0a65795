"""What travels to a cluster with a job: the code, the resolved recipe, and the local files that it names."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jobs
from eval import layout
from otpo.errors import UserError
from otpo.identity import source_identity
from pipeline.recipe import WORLD_PREFIX, Recipe, digest, dump_yaml, make_recipe

PACKAGES = ("eval", "jobs", "otpo", "pipeline")
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".gz")


@dataclass(frozen=True)
class Submission:
    """A run as the cluster will see it.

    Attributes:
        recipe: its paths are valid on the cluster.
        inputs: path inside the working directory -> the local file or folder that is sent there.
        runs: the folder of runs, absolute on the cluster.
        python: the interpreter of the job.
        id: of the job; equal for equal recipe, inputs and folder.
    """

    recipe: Recipe
    inputs: dict[str, Path]
    runs: str
    python: str
    redo: bool
    id: str

    @property
    def entrypoint(self) -> str:
        """The job's shell command."""
        words = [self.python, "-m", "jobs.cli", "run", layout.RECIPE, "--runs", self.runs]
        return shlex.join([*words, *(["--redo"] if self.redo else [])])


def prepare(recipe: Recipe, *, runs: str, shared: list[Path], python: str, redo: bool) -> Submission:
    """Turn local paths of a recipe into paths that are valid on the cluster.

    Args:
        shared: folders that the cluster sees under the same path; files in them are not sent.

    Raises:
        UserError: a relative path that does not exist here.
    """
    tree = recipe.model_dump(mode="json")
    tree["cluster"]["address"] = None  # the job's driver is on the cluster
    tree["generate"]["tasks"] = recipe.generate.named_tasks()
    inputs: dict[str, Path] = {}
    identities: dict[str, str] = {}
    for keys in (
        ("model", "path"),
        ("base", "data"),
        ("data", "path"),
        *(("data", "datasets", name, "path") for name in tree["data"]["datasets"]),
        ("pairs", "prompts"),
        ("pairs", "scorer", "reward_model"),
        ("judge", "reference"),
        ("judge", "reward_model"),
        ("judge", "calibration"),
        *(("generate", "tasks", name) for name in tree["generate"]["tasks"]),
    ):
        section: Any = tree
        for key in keys[:-1]:
            section = (section or {}).get(key)
        source = (section or {}).get(keys[-1])
        if not source or source.startswith(WORLD_PREFIX) or source in {"base", *recipe.methods}:
            continue
        path = Path(source).expanduser().absolute()
        if not path.exists():
            if Path(source).suffix in DATA_SUFFIXES and not Path(source).is_absolute():
                raise UserError(f"{'.'.join(keys)}: there is no file or folder '{source}' here.")
            continue  # a hub name, or a path that exists on the cluster only
        identities[".".join(keys)] = identity = source_identity(str(path)) if path.is_file() else _folder_identity(path)
        if any(path.is_relative_to(folder.absolute()) for folder in shared):
            section[keys[-1]] = str(path)
        else:
            section[keys[-1]] = f"inputs/{identity}/{path.name}"
            inputs[section[keys[-1]]] = path
    placed = make_recipe(tree)
    name = f"{recipe.name}-{digest([placed.model_dump(mode='json'), identities, runs, redo])}"
    return Submission(placed, inputs, runs, python, redo, name)


def _folder_identity(folder: Path) -> str:
    """A hash of names, sizes and times: hashing a large model's content would take longer than sending the job."""
    stats = [(str(p.relative_to(folder)), p.stat()) for p in sorted(folder.rglob("*")) if p.is_file()]
    return digest([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])


def stage(submission: Submission, folder: Path) -> None:
    """Lay out the job's working directory: the packages, `recipe.yaml`, `inputs/`."""
    root = Path(jobs.__file__).parent.parent
    for package in PACKAGES:
        shutil.copytree(root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / layout.RECIPE).write_text(dump_yaml(submission.recipe))
    for place, path in submission.inputs.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(path, folder / place) if path.is_dir() else shutil.copy2(path, folder / place)


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
