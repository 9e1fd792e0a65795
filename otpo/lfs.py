"""Files that Git LFS keeps elsewhere: a clone without them has a few lines of text in their places."""

from __future__ import annotations

from pathlib import Path

BEGINS = b"version https://git-lfs"
POINTER = "is what Git LFS leaves in place of the file: fetch it, `git lfs pull` in its repository"


def is_pointer(path: Path) -> bool:
    """Whether a file holds nothing but where Git LFS keeps its content."""
    with path.open("rb") as file:
        return file.read(len(BEGINS)) == BEGINS
