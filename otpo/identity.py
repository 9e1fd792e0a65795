"""What a file or a model folder is, whatever it is called. Imports neither torch nor transformers.

Content decides. A file is read once in a process and again when its size, its times or its inode change: its time of
change (ctime) cannot be set by hand, so a file that was replaced by one of the same size and date is read again too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

# What transformers reads where a folder has neither model.safetensors nor its index, and what other programs read.
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf")
_INDEX = "model.safetensors.index.json"
_SETTINGS_FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")

_Stat = tuple[str, int, int, int, int]


def model_fingerprint(path: str | Path) -> str:
    """Identity of a model: SHA-256 over its configuration, weights and tokenizer, 16 hex digits.

    A hub name stands for itself together with the revision that it resolves to.
    """
    folder = Path(path)
    if folder.is_dir():
        parts = {*folder.glob("*.json"), *weight_files(folder), *folder.glob("*.jinja"), *folder.glob("*.model")}
        return files_hash(sorted(parts))
    return hashlib.sha256(f"{path}@{_revision(str(path))}".encode()).hexdigest()[:16]


def weight_files(folder: Path) -> list[Path]:
    """The files of a model folder that hold weights: those at its top, and those that an index names in subfolders.

    Beside model.safetensors or its index no others are read.
    """
    found = _safetensors(folder)
    if any((folder / name).is_file() for name in ("model.safetensors", _INDEX)):
        others = {*folder.glob("adapter_model.bin")}
    else:
        others = {path for pattern in _OTHER_WEIGHTS for path in folder.glob(pattern)}
        others |= _indexed(folder / "pytorch_model.bin.index.json")
    return sorted(found | others)


def _safetensors(folder: Path) -> set[Path]:
    return {*folder.glob("*.safetensors"), *_indexed(folder / _INDEX)}


def _indexed(index: Path) -> set[Path]:
    """The files that an index names, which need not lie beside it."""
    named: set[str] = set()
    if index.is_file():
        with suppress(
            ValueError, KeyError, TypeError, AttributeError
        ):  # a torn index is refused where the model is loaded
            named = set(json.loads(index.read_text())["weight_map"].values())
    return {index.parent / name for name in named if (index.parent / name).is_file()}


def content_digest(folder: Path) -> str:
    """SHA-256 over what decides a folder's outputs: weights in safetensors, configs and tokenizer; 64 hex digits."""
    named = [folder / name for name in (*TOKENIZER_FILES, *_SETTINGS_FILES)]
    return _content_digest(tuple(map(_stat, sorted([*filter(Path.is_file, named), *_safetensors(folder)]))))


def files_hash(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of files, 16 hex digits."""
    return _files_hash(tuple(map(_stat, paths)))


def source_identity(source: str) -> str:
    """Identity of an input named in a recipe: a file's or model folder's hash, else the name itself."""
    path = Path(source)
    if path.is_file():
        return files_hash([path])
    return model_fingerprint(path) if path.is_dir() else source


def _stat(path: Path) -> _Stat:
    found = path.stat()
    return str(path.absolute()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


@lru_cache(maxsize=256)
def _files_hash(files: tuple[_Stat, ...]) -> str:
    digest = hashlib.sha256()
    for name, size, *_ in files:
        path = Path(name)
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as stream:
            while block := stream.read(2**22):
                digest.update(block)
    return digest.hexdigest()[:16]


@lru_cache(maxsize=64)
def _content_digest(files: tuple[_Stat, ...]) -> str:
    total = hashlib.sha256()
    for name, *_ in files:
        with open(name, "rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _revision(name: str) -> str | None:
    """The commit that a hub name resolves to, told from where its config.json lies in the local cache."""
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    return extract_commit_hash(cached_file(name, "config.json"), None)
