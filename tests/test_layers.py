"""Imports go down only, and what a second call needs is light to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "otpo": {"otpo"},
    "eval": {"eval"},
    "pipeline": {"pipeline", "otpo", "eval"},
    "jobs": {"jobs", "pipeline", "otpo", "eval"},
}
FORBIDDEN = {"otpo": {"ray", "vllm"}, "eval": {"ray", "vllm", "torch", "transformers"}}
HEAVY = ("torch", "ray", "vllm", "transformers", "sklearn", "matplotlib", "scipy", "pandas", "datasets", "openai", "ot")
LIGHT = (
    "jobs.cli",
    "pipeline.config",
    "pipeline.recipes",
    "pipeline.manifest",
    "otpo.methods",
    "otpo.errors",
    "otpo.identity",
    "eval.config",
)


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of a file, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute here"
            yield node.lineno, node.module or ""


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_go_down_only(package):
    files = list((ROOT / package).rglob("*.py"))
    assert len(files) > 5
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in files
        for line, module in imports(file)
        if (top := module.split(".")[0]) in (MAY_IMPORT.keys() | {"tests"}) - MAY_IMPORT[package]
        or top in FORBIDDEN.get(package, set())
    ]
    assert not wrong


def loaded(statement: str, *watched: str) -> list[str]:
    """Which of the modules a fresh interpreter has loaded after the statement."""
    code = f"import sys\n{statement}\nprint([m for m in {watched!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout)


def test_light_modules_load_nothing_heavy():
    assert loaded("import " + ", ".join(LIGHT), *HEAVY) == []


def test_the_science_and_the_evaluation_load_without_ray():
    science = [f"otpo.{file.stem}" for file in (ROOT / "otpo").glob("*.py") if file.stem != "__init__"]
    assert loaded("import otpo.losses, " + ", ".join(science), "ray", "vllm", "eval", "pipeline") == []
    evaluation = [f"eval.{file.stem}" for file in (ROOT / "eval").glob("*.py") if file.stem != "__init__"]
    assert loaded("import " + ", ".join(evaluation), "ray", "vllm", "torch", "transformers", "otpo", "pipeline") == []


def test_data_is_checked_without_ray():
    assert loaded("import pipeline.run, pipeline.prepare, jobs.worlds", "ray", "vllm") == []
