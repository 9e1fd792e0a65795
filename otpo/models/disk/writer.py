"""Weights written as transformers lays them out, while they arrive: no more than one file is held."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from otpo.files import write_json
from otpo.models.disk.stored import INDEX, WHOLE

FILE_BYTES = 5 * 10**9
"""Most bytes of a file, unless a single weight has more."""


def write_weights(folder: Path, parts: Iterable[Mapping[str, Tensor]], *, file_bytes: int = FILE_BYTES) -> None:
    """Write `model.safetensors`, or several files and their index.

    Args:
        parts: weights by name, on the CPU.
    """
    held: dict[str, Tensor] = {}
    files: list[list[str]] = []
    count = size = 0

    def partial(number: int) -> Path:
        return folder / f".{number}.partial"

    def write() -> None:
        save_file(held, partial(len(files)), {"format": "pt"})
        files.append(list(held))
        held.clear()

    for part in parts:
        for name, tensor in part.items():
            if held and sum(each.nbytes for each in held.values()) + tensor.nbytes > file_bytes:
                write()
            held[name] = tensor.contiguous()
            count, size = count + tensor.numel(), size + tensor.nbytes
    write()
    if len(files) == 1:
        os.replace(partial(0), folder / WHOLE)
        return
    places: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        os.replace(partial(number), folder / file)
        places |= dict.fromkeys(names, file)
    about = {"total_parameters": count, "total_size": size}
    write_json(folder / INDEX, {"metadata": about, "weight_map": dict(sorted(places.items()))})
