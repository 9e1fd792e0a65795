"""Pages whose blocks are run as they are printed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: `console` is for a person, everything else is run or written."""

    language: str
    file: str
    text: str


def blocks(page: str) -> Iterator[Block]:
    for language, file, text in BLOCK.findall((ROOT / "docs" / page).read_text()):
        yield Block(language, file, text)


def follow(page: str, folder: Path, env: dict[str, str]) -> dict[str, str]:
    """Do what a page says; gives the output of each command."""
    said = {}
    for block in blocks(page):
        if block.file:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text)
        elif block.language in ("sh", "python"):
            command = ["bash", "-euc"] if block.language == "sh" else [sys.executable, "-c"]
            done = subprocess.run([*command, block.text], cwd=folder, env=env, capture_output=True, text=True)
            assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
            said[block.text.strip()] = done.stdout + done.stderr
    return said
