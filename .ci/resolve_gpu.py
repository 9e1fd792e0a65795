"""Resolve the packages of a GPU machine with pip's own dry run, on a machine without a GPU. Installs nothing.

make check-install     constraints-gpu.txt is exactly what pip finds: nothing missing, nothing unpinned
make pin-gpu           write constraints-gpu.txt anew, after a change of pyproject.toml or constraints-cpu.txt

Takes about 4 minutes and 110 MB where the index serves no metadata of its own (PEP 658), else seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GPU, CPU = ROOT / "constraints-gpu.txt", ROOT / "constraints-cpu.txt"
# Where the two files differ: vllm 0.32.0 wants one version of apache-tvm-ffi.
APART = {"apache-tvm-ffi"}
WHAT = ".[gpu,aws,dev]"
HEADER = f"# Every version on a machine with a GPU: what pip finds for `{WHAT}`. Written by `make pin-gpu`.\n"
PYTHON = "3.12"  # of Ubuntu 24.04: the image in Dockerfile and the machines of cluster.yaml
PIP = "pip==26.3"  # the pip that comes with Python 3.11 downloads every wheel in a dry run, 6 GB


def canonical(name: str) -> str:
    """The name that pip compares."""
    return name.lower().replace("_", "-").replace(".", "-")


def by_name(line: str) -> str:
    """The order of both files."""
    return line.split("==")[0].lower()


def pins(path: Path) -> dict[str, str]:
    """Canonical name -> "name==version" as it stands in the file."""
    lines = [line.strip() for line in path.read_text().splitlines()]
    return {canonical(line.split("==")[0]): line for line in lines if line and not line.startswith("#")}


def resolve(constraints: dict[str, str]) -> dict[str, str]:
    """What pip would install for WHAT under the constraints, in the form of `pins`.

    Raises:
        SystemExit: pip finds no solution, or one that cannot use a GPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        wanted.write_text("\n".join(constraints.values()))
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        subprocess.run([*pip, "--target", f"{folder}/pip", PIP], check=True)
        dry_run = ["--dry-run", "--ignore-installed", "--use-feature=fast-deps", "--report", str(report)]
        target = ["--python-version", PYTHON, "--only-binary=:all:", "--target", f"{folder}/none"]
        # further indexes may serve a torch for CPUs
        environment = {k: v for k, v in os.environ.items() if k not in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS")}
        environment["PYTHONPATH"] = f"{folder}/pip"
        command = [*pip, *dry_run, *target, "--constraint", str(wanted), WHAT]
        if subprocess.run(command, cwd=ROOT, env=environment).returncode:
            sys.exit(f"pip finds no solution for `{WHAT}` with {GPU.name}: its reason stands above.")
        packages = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    found = {canonical(p["name"]): f"{p['name']}=={p['version']}" for p in packages if p["name"] != "otpo-pipeline"}
    if "nvidia-nccl-cu13" not in found or "+" in found["torch"]:
        sys.exit(f"Expected a torch built for CUDA, found {found['torch']}: does a local index serve a CPU build?")
    return found


def main() -> None:
    """Check the file, or write it with --write."""
    if "--write" in sys.argv:
        shared = {name: line for name, line in pins(CPU).items() if name not in APART}
        found = resolve({**pins(GPU), **shared})
        GPU.write_text(HEADER + "".join(f"{line}\n" for line in sorted(found.values(), key=by_name)))
        print(f"{GPU.name}: {len(found)} packages.")
        return
    pinned = pins(GPU)
    found = resolve(pinned)
    wrong = [f"{line} is not pinned" for name, line in found.items() if name not in pinned]
    wrong += [f"{line} is pinned, and nothing asks for it" for name, line in pinned.items() if name not in found]
    if wrong:
        sys.exit("\n".join([*wrong, "Run `make pin-gpu` and commit constraints-gpu.txt."]))
    print(f"{GPU.name}: pip resolves `{WHAT}` for Python {PYTHON} to its {len(found)} packages, no other.")


if __name__ == "__main__":
    main()
