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
from otpo.files import NOT_READ, is_address
from otpo.identity import source_identity
from pipeline.recipe import WORLD_PREFIX, Recipe, digest, dump_yaml, make_recipe

PACKAGES = ("eval", "jobs", "otpo", "pipeline")
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".gz")
VERBS = ("run", "train", "sweep")
LEFT_HERE = ("__pycache__", ".git", ".gitignore", ".rayignore")  # Ray would leave out what the last two name


@dataclass(frozen=True)
class Job:
    """A job as it is sent.

    Attributes:
        id: equal for what would do the same.
        entrypoint: its shell command.
        name: what it is about.
        results: where it writes, as the cluster sees it.
        texts, inputs: path inside the working directory -> a file's content; the local file or folder that is sent.
        judge_key: the environment variable with the judge's key, if a judge is asked.
    """

    id: str
    entrypoint: str
    name: str
    results: str
    texts: dict[str, str]
    inputs: dict[str, Path]
    judge_key: str | None


@dataclass(frozen=True)
class Submission:
    """A run as the cluster will see it.

    Attributes:
        recipe: its paths are valid on the cluster.
        inputs: path inside the working directory -> the local file or folder that is sent there.
        runs: the folder of runs, absolute on the cluster.
        python: the interpreter of the job.
        verb: what the job does: one of VERBS.
        id: of the job; equal for equal recipe, inputs, folder and verb.
    """

    recipe: Recipe
    inputs: dict[str, Path]
    runs: str
    python: str
    redo: bool
    verb: str
    id: str

    @property
    def entrypoint(self) -> str:
        """The job's shell command."""
        words = [self.python, "-m", "jobs.cli", self.verb, layout.RECIPE, "--runs", self.runs]
        return shlex.join([*words, *(["--redo"] if self.redo else [])])

    @property
    def job(self) -> Job:
        """The run as a job."""
        judge = self.recipe.judge
        return Job(
            id=self.id,
            entrypoint=self.entrypoint,
            name=self.recipe.name,
            results=f"{self.runs}/{self.recipe.name}",
            texts={layout.RECIPE: dump_yaml(self.recipe)},
            inputs=self.inputs,
            judge_key=judge.api_key_env if judge.url and not judge.url.startswith(WORLD_PREFIX) else None,
        )


def prepare(recipe: Recipe, *, runs: str, shared: list[Path], python: str, redo: bool, verb: str = "run") -> Submission:
    """Turn local paths of a recipe into paths that are valid on the cluster.

    Args:
        shared: folders that the cluster sees under the same path; files in them are not sent.

    Raises:
        UserError: a relative path that does not exist here, or no verb of a job.
    """
    if verb not in VERBS:
        raise UserError(f"--verb {verb}: expected one of {', '.join(VERBS)} for a recipe.")
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
        ("pairs", "scorer", "vllm", "model"),
        ("judge", "reference"),
        ("judge", "reward_model"),
        ("judge", "vllm", "model"),
        ("judge", "calibration"),
        *(("generate", "tasks", name) for name in tree["generate"]["tasks"]),
    ):
        section: Any = tree
        for key in keys[:-1]:
            section = (section or {}).get(key)
        source = (section or {}).get(keys[-1])
        if not source or source.startswith(WORLD_PREFIX) or source in {"base", *recipe.methods}:
            continue
        if is_address(source):
            raise UserError(
                f"{'.'.join(keys)}: expected a path or a hub name, found the address '{source}': {NOT_READ}."
            )
        path = Path(source).expanduser().absolute()
        if not path.exists():
            if Path(source).suffix in DATA_SUFFIXES and not Path(source).is_absolute():
                raise UserError(f"{'.'.join(keys)}: there is no file or folder '{source}' here.")
            continue  # a hub name, or a path that exists on the cluster only
        section[keys[-1]], identities[".".join(keys)] = place(path, shared, inputs)
    placed = make_recipe(tree)
    what = [placed.model_dump(mode="json"), identities, runs, redo, *([] if verb == "run" else [verb])]
    return Submission(placed, inputs, runs, python, redo, verb, f"{recipe.name}-{digest(what)}")


def place(path: Path, shared: list[Path], inputs: dict[str, Path]) -> tuple[str, str]:
    """Where the cluster finds a local file or folder, and its identity. What has to travel is added to `inputs`."""
    identity = source_identity(str(path)) if path.is_file() else _folder_identity(path)
    if any(path.is_relative_to(folder.absolute()) for folder in shared):
        return str(path), identity
    there = f"inputs/{identity}/{path.name}"
    inputs[there] = path
    return there, identity


def _folder_identity(folder: Path) -> str:
    """A hash of names, sizes and times: hashing a large model's content would take longer than sending the job."""
    stats = [(str(p.relative_to(folder)), p.stat()) for p in sorted(folder.rglob("*")) if p.is_file()]
    return digest([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])


def stage(job: Job, folder: Path) -> None:
    """Lay out the job's working directory: the packages, its texts (`recipe.yaml`), `inputs/`.

    Of a folder travel its files, whatever a `.gitignore` in it says; not its history, and nothing that is no file
    (sockets, links that lead nowhere).
    """
    root = Path(jobs.__file__).parent.parent
    for package in PACKAGES:
        shutil.copytree(root / package, folder / package, ignore=_left_here)
    for name, text in job.texts.items():
        (folder / name).write_text(text)
    for there, path in job.inputs.items():
        (folder / there).parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, folder / there, ignore=_left_here)
        else:
            shutil.copy2(path, folder / there)


def _left_here(folder: str, names: list[str]) -> list[str]:
    """What of a folder does not travel."""
    paths = {name: Path(folder, name) for name in names}
    return [name for name, path in paths.items() if name in LEFT_HERE or not (path.is_file() or path.is_dir())]


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder that travel."""
    if not path.is_dir():
        return path.stat().st_size
    inside = (p for p in path.rglob("*") if p.is_file() and not set(p.relative_to(path).parts) & set(LEFT_HERE))
    return sum(p.stat().st_size for p in inside)
