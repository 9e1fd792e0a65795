"""Where weights lie in the safetensors files of a model folder, told from the files' headers. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from otpo.lfs import POINTER, is_pointer

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
READ = (WHOLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Names of which transformers looks for the first that is there."""
BLOCK = 2**22


class Place(NamedTuple):
    """Where a weight lies: `size` bytes from `start`. `kind` is its precision, as safetensors names it, and shape."""

    path: Path
    start: int
    size: int
    kind: tuple[str, tuple[int, ...]]


def places(path: Path) -> Iterator[tuple[str, Place]]:
    """The weights of one safetensors file, by name. Raises ValueError, or KeyError, for what is none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > path.stat().st_size:
            raise ValueError(f"{path} is cut short, or no safetensors file")
        header: dict[str, Any] = json.loads(file.read(length))
    for name, about in header.items():
        if name != "__metadata__":
            start, end = about["data_offsets"]
            yield name, Place(path, 8 + length + start, end - start, (about["dtype"], tuple(about["shape"])))


def not_whole(path: Path) -> str | None:
    """What is wrong with a safetensors file, told from its header and its size; None where it is whole."""
    if is_pointer(path):
        return POINTER
    size = path.stat().st_size
    try:
        end = max((place.start + place.size for _, place in places(path)), default=size)
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"has {size:,} bytes and no whole header of safetensors: copy it anew"
    return None if end == size else f"has {size:,} bytes, and its header names {end:,}: copy it anew"


def missing_files(folder: Path) -> list[str]:
    """The files that the index of a folder names, and that are not there; none where no index is read.

    Raises ValueError for an index that is torn.
    """
    if (folder / WHOLE).is_file() or not (folder / INDEX).is_file():
        return []
    try:
        named = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("no weight_map") from error
    return sorted(name for name in named if not (folder / name).is_file())


def model_places(folder: Path) -> dict[str, Place]:
    """The weights that transformers reads from a folder, by name; empty where it reads other files."""
    if (folder / WHOLE).is_file():
        files = [WHOLE]
    elif (folder / INDEX).is_file():
        files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    else:
        return {}
    return {name: place for file in files for name, place in places(folder / file)}


def same_bytes(one: Place, other: Place) -> bool:
    """Whether two weights are equal. They are read by blocks."""
    return one.kind == other.kind and all(a == b for a, b in zip(_blocks(one), _blocks(other), strict=True))


def _blocks(place: Place) -> Iterator[bytes]:
    with place.path.open("rb") as file:
        file.seek(place.start)
        left = place.size
        while left:
            block = file.read(min(BLOCK, left))
            if not block:
                return
            left -= len(block)
            yield block
