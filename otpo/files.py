"""Writing files so that an interruption leaves the old content or the new, never a part. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Write a text file; a reader sees it whole or as it was."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)
