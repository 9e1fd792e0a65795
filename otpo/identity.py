"""What a file or a model folder is, whatever it is called. Imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def model_fingerprint(path: str | Path) -> str:
    """Identity of a model: SHA-256 over its configuration, weights and tokenizer, 16 hex digits.

    A hub name stands for itself together with the revision that it resolves to.
    """
    folder = Path(path)
    if folder.is_dir():
        parts = [
            *folder.glob("*.json"),
            *folder.glob("*.safetensors"),
            *folder.glob("*.jinja"),
            *folder.glob("*.model"),
        ]
        return files_hash(sorted(parts))
    from transformers import AutoConfig

    revision = getattr(AutoConfig.from_pretrained(path), "_commit_hash", None)
    return hashlib.sha256(f"{path}@{revision}".encode()).hexdigest()[:16]


def files_hash(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of files, 16 hex digits."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as stream:
            while block := stream.read(2**22):
                digest.update(block)
    return digest.hexdigest()[:16]


def source_identity(source: str) -> str:
    """Identity of an input named in a recipe: a file's or model folder's hash, else the name itself."""
    path = Path(source)
    if path.is_file():
        return files_hash([path])
    return model_fingerprint(path) if path.is_dir() else source
