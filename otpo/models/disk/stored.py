"""Where weights lie in the safetensors files of a model folder, told from the files' headers. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BLOCK = 2**22


class Place(NamedTuple):
    """Where a weight lies: `size` bytes from `start`. `kind` is its precision, as safetensors names it, and shape."""

    path: Path
    start: int
    size: int
    kind: tuple[str, tuple[int, ...]]


def places(path: Path) -> Iterator[tuple[str, Place]]:
    """The weights of one safetensors file, by name."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    for name, about in header.items():
        if name != "__metadata__":
            start, end = about["data_offsets"]
            yield name, Place(path, 8 + length + start, end - start, (about["dtype"], tuple(about["shape"])))


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
