"""`torch.compile` of what a layer does element by element between its matrix products.

A norm reads and writes its tokens several times, an activation with its gate too; compiled, once. Whole layers are not
compiled: attention is given the batch's `segments` as a tuple of integers, and each new batch would be compiled again.
"""

from __future__ import annotations

import os
import shutil
import sys

from torch import nn

from otpo.errors import UserError

PARTS = ("RMSNorm", "MLP")  # how transformers' class names of these parts end, whatever the architecture


def compile_parts(model: nn.Module) -> list[str]:
    """Let a model's norms and feed-forward parts be compiled when they are first used, once for all their lengths.

    Returns:
        Their names, as in `named_modules`; empty where the architecture has none.
    """
    found = [(name, module) for name, module in model.named_modules() if type(module).__name__.endswith(PARTS)]
    for _, module in found:
        module.compile(dynamic=True)
    return [name for name, _ in found]


def check_compiler(where: str) -> None:
    """Raise a `UserError` if a CPU has no C++ compiler for `torch.compile`. GPUs bring their own."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"{where}: torch.compile needs a C++ compiler, and '{compiler}' is not to be found. Install one on every"
            " node, name it in the environment variable CXX, or leave the key out."
        )
