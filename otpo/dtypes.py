"""The precisions that a recipe names, by their names in torch and vLLM. Needs no torch to be imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def torch_dtype(name: str) -> torch.dtype:
    """Torch's dtype of a precision that a recipe names."""
    import torch

    return getattr(torch, TORCH_NAMES[name])
