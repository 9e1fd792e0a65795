"""The command in a process of its own, and what its refusals have in common."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WATCH = """
import atexit, json, sys
from jobs.cli import main
atexit.register(lambda: open(sys.argv[0], "w").write(json.dumps([m for m in ("ray", "torch") if m in sys.modules])))
main()
"""


@dataclass
class Done:
    code: int
    out: str
    err: str
    loaded: list[str]
    started_ray: bool
    seconds: float


def otpo(folder: Path, *arguments: Any, **environment: str) -> Done:
    """The command in a process of its own, in `folder`."""
    watched = folder / "loaded.json"
    command = [sys.executable, "-c", f"import sys; sys.argv[0] = {str(watched)!r}\n{WATCH}", *map(str, arguments)]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as short:  # a socket's path has 107 bytes at most
        rays = Path(short) / "r"  # where Ray would keep its session
        environment = {**os.environ, "RAY_TMPDIR": str(rays), **environment}
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=environment)
        loaded, seconds = json.loads(watched.read_text()), time.monotonic() - started
        return Done(done.returncode, done.stdout, done.stderr, loaded, rays.exists(), seconds)


def refused(done: Done, *words: str) -> None:
    """Exit code 2, one message with these words, no traceback, and Ray was not started."""
    assert done.code == 2, done.err
    for word in words:
        assert word in done.err, done.err
    assert "Traceback" not in done.err and len(done.err) < 2000
    assert not done.started_ray


def nothing_begun(folder: Path) -> None:
    """No run has left anything in `folder`."""
    assert not list(folder.glob("runs/*"))
