"""Imports go down only and in no circle, rooms stay small, and what a second call needs is light to import."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "otpo": {"otpo"},
    "eval": {"eval", "otpo"},  # of otpo only SHARED
    "pipeline": {"pipeline", "otpo", "eval"},
    "jobs": {"jobs", "pipeline", "otpo", "eval"},
}
# what both the science and the evaluation need: errors, files, and how a row's cells are read; they load nothing heavy
SHARED = {
    "otpo.errors",
    "otpo.files",
    "otpo.data.formats.cells",
    "otpo.data.formats.names",
    "otpo.data.formats.prompts",
    "otpo.data.rows",
}
FORBIDDEN = {"otpo": {"ray", "vllm"}, "eval": {"ray", "vllm", "torch", "transformers"}}
HEAVY = ("torch", "ray", "vllm", "transformers", "sklearn", "matplotlib", "scipy", "pandas", "datasets", "openai", "ot")
LIGHT = (
    "jobs.cli",
    "pipeline.recipe",
    "pipeline.notebook",
    "pipeline.run.manifest",
    "pipeline.tracking.mirror",
    "otpo.methods",
    "otpo.errors",
    "otpo.identity",
    "eval.judge.config",
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


def test_the_evaluation_knows_of_the_science_only_what_both_need():
    found = {name for file in (ROOT / "eval").rglob("*.py") for _, name in imports(file) if name.startswith("otpo")}
    assert found <= SHARED


def modules(package: str) -> list[str]:
    """Every module of a package, as it is imported."""
    files = sorted((ROOT / package).rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files if file.stem != "__main__"]
    return [name.removesuffix(".__init__") for name in names]


def imported(file: Path) -> Iterator[str]:
    """Modules that a file imports; of `from package import module` the module."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_imports_go_round_in_a_circle():
    """Imports inside functions and those for types alone count: they are edges of the same picture."""
    known = {name for package in MAY_IMPORT for name in modules(package)}
    edges = {}
    for name in known:
        path = ROOT / name.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        edges[name] = {target for target in imported(file) if target in known and target != name}
    try:
        tuple(graphlib.TopologicalSorter(edges).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_folders_and_modules_stay_small():
    """A reader sees what a folder holds at a glance, and reads a module in one go."""
    files = [file for package in (*MAY_IMPORT, "tests") for file in (ROOT / package).rglob("*.py")]
    folders = Counter(file.parent.relative_to(ROOT) for file in files if file.stem != "__init__")
    assert {str(folder): count for folder, count in folders.items() if count > 13} == {}
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files if "tests" not in file.parts
    }
    assert {file: lines for file, lines in lengths.items() if lines > 350} == {}


def test_no_class_is_deeper_than_one_base_of_ours():
    bases: dict[str, list[str]] = {}
    for package in MAY_IMPORT:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ClassDef):
                    bases[node.name] = [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
    deep = {name for name, own in bases.items() for base in own if any(above in bases for above in bases.get(base, []))}
    assert deep == set()


def loaded(statement: str, *watched: str) -> list[str]:
    """Which of the modules a fresh interpreter has loaded after the statement."""
    code = f"import sys\n{statement}\nprint([m for m in {watched!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout)


def test_light_modules_load_nothing_heavy():
    assert loaded("import " + ", ".join(LIGHT), *HEAVY) == []


def test_the_science_and_the_evaluation_load_without_ray():
    assert loaded("import " + ", ".join(modules("otpo")), "ray", "vllm", "eval", "pipeline") == []
    assert loaded("import " + ", ".join(modules("eval")), "ray", "vllm", "torch", "transformers", "pipeline") == []


def test_benchmarks_of_a_step_run_with_torch_and_transformers_alone():
    names = ("__main__", "step", "methods", "profile", "ours")
    statement = "import " + ", ".join(f"tests.benchmarks.{name}" for name in names)
    assert loaded(statement, "ray", "vllm", "pydantic", "datasets", "pipeline", "eval", "jobs") == []


def test_data_is_checked_without_ray():
    assert loaded("import pipeline.run.run, pipeline.train.tokens, jobs.worlds", "ray", "vllm") == []


def test_a_finished_run_is_found_without_torch():
    assert loaded("import pipeline.run.run, jobs.worlds", "ray", "torch", "transformers") == []
