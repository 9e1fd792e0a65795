"""What travels to a cluster with a job: the code, the resolved recipe, and the local files that it names."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import jobs
from eval import layout
from eval.judge.protocols.files import is_file, template_of
from otpo.errors import UserError
from otpo.files import NOT_READ, is_address
from otpo.identity import source_identity
from otpo.methods import FROZEN_MODELS
from pipeline.recipe import WORLD_PREFIX, Recipe, digest, dump_yaml, make_recipe

PACKAGES = ("eval", "jobs", "otpo", "pipeline")
PATHS = (  # keys of a recipe that name a local file or folder
    "model.path",
    "base.data",
    "data.path",
    "data.datasets.*.path",
    *(f"methods.*.{name}" for name in FROZEN_MODELS),
    "pairs.prompts",
    "*.ca_file",
    "*.protocol",
    "*.reward_model",
    "*.vllm.model",
    "judge.reference",
    "judge.calibration",
    "generate.tasks",
    "generate.tasks.*",
)
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".gz")
VERBS = ("run", "train", "sweep", "study")
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

    def sent(where: str) -> Callable[[str, str], str]:
        def there(key: str, source: str) -> str:
            found, identity = _place_source(key, source, recipe, shared, inputs)
            if identity is not None:
                identities[where + key] = identity
            return found

        return there

    study = tree.pop("study")
    changes = {name: _with_paths(each, "", sent(f"study.regimes.{name}.")) for name, each in study["regimes"].items()}
    tree = _with_paths(tree, "", sent("")) | {"study": study | {"regimes": changes}}
    placed = make_recipe(tree)
    what = [placed.model_dump(mode="json"), identities, runs, redo, *([] if verb == "run" else [verb])]
    return Submission(placed, inputs, runs, python, redo, verb, f"{recipe.name}-{digest(what)}")


def _with_paths(value: Any, key: str, there: Callable[[str, str], str]) -> Any:
    """A part of a recipe with another value for each key that names a file or folder (`PATHS`)."""
    if isinstance(value, dict):
        return {name: _with_paths(each, f"{key}.{name}" if key else name, there) for name, each in value.items()}
    named = isinstance(value, str) and value and any(fnmatchcase(key, pattern) for pattern in PATHS)
    return there(key, value) if named else value


def _place_source(
    key: str, source: str, recipe: Recipe, shared: list[Path], inputs: dict[str, Path]
) -> tuple[str, str | None]:
    """What stands for the source of a key on the cluster; its identity, or None where nothing of it is here."""
    if source.startswith(WORLD_PREFIX) or source in {"base", *recipe.methods}:
        return source, None
    if is_address(source):
        raise UserError(f"{key}: expected a path or a hub name, found the address '{source}': {NOT_READ}.")
    is_protocol = key.endswith(".protocol")
    if is_protocol and not is_file(source):
        return source, None  # the name of one that is known
    path = Path(source).expanduser().absolute()
    if path.exists():
        return place_protocol(path, shared, inputs) if is_protocol else place(path, shared, inputs)
    must_exist = is_protocol or key.endswith(".ca_file") or path.suffix in DATA_SUFFIXES
    if must_exist and not Path(source).is_absolute():
        raise UserError(f"{key}: there is no file or folder '{source}' here.")
    return source, None  # a hub name, or a path that exists on the cluster only


def place_protocol(path: Path, shared: list[Path], inputs: dict[str, Path]) -> tuple[str, str]:
    """As `place`, for a file of a judge's protocol: the template that it names travels beside it."""
    there, identity = place(path, shared, inputs)
    template = template_of(path)
    if template is None or there not in inputs:
        return there, identity
    if not template.is_relative_to(path.parent):
        raise UserError(f"{path}: its template {template} is not in its folder, so it does not travel: move it there.")
    inputs[f"{PurePosixPath(there).parent}/{template.relative_to(path.parent)}"] = template
    return there, digest([identity, source_identity(str(template))])


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
