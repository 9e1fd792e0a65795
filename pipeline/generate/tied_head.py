"""Whether a folder's configuration tells the truth about a tied head: vLLM goes by it, transformers by the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
BLOCK = 2**22


class _Place(NamedTuple):
    """Where a weight lies in a safetensors file."""

    path: Path
    start: int
    size: int
    kind: tuple[str, tuple[int, ...]]


def has_own_head(folder: Path) -> bool:
    """Whether the weights hold a head that is not the embeddings. Reads no more of them than these two."""
    head, embeddings = None, None
    for path in sorted(folder.glob("*.safetensors")):
        for name, place in _places(path):
            head = place if name.endswith(HEADS) else head
            embeddings = place if name.endswith(EMBEDDINGS) and "vision" not in name else embeddings
    if head is None or embeddings is None:
        return False
    return head.kind != embeddings.kind or any(
        one != other for one, other in zip(_blocks(head), _blocks(embeddings), strict=True)
    )


def _places(path: Path) -> Iterator[tuple[str, _Place]]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    for name, about in header.items():
        if name != "__metadata__":
            start, end = about["data_offsets"]
            yield name, _Place(path, 8 + length + start, end - start, (about["dtype"], tuple(about["shape"])))


def _blocks(place: _Place) -> Iterator[bytes]:
    with place.path.open("rb") as file:
        file.seek(place.start)
        left = place.size
        while left:
            block = file.read(min(BLOCK, left))
            if not block:
                return
            left -= len(block)
            yield block
