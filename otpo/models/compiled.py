"""`torch.compile` of what stands between the matrix products: what is read and written many times, is once.

Decoder layers are compiled, and what is done to the vocabulary. Three parts of a layer are not. Attention over shared
prompts: its blocks follow the lengths of a batch, and every new batch would be compiled again. Experts: which of them
has how many tokens is known only when they run. What peft wraps whose adapted weight is no module's: it has a class of
its own in every pass.
"""

from __future__ import annotations

import os
import shutil
import sys

import torch
from transformers import AttentionInterface

from otpo.errors import UserError
from otpo.models.attention import SHARED_PROMPTS, shared_prompts_attention
from otpo.models.logprobs import Passes, differentiate, read
from otpo.models.policy import PolicyModel, decoder_layers

LEFT_ALONE = f"{SHARED_PROMPTS}_left_alone"
PARTS_LEFT_ALONE = ("Experts", "ParamWrapper")  # how class names of transformers and of peft end


def compile_layers(model: PolicyModel) -> None:
    """Let a model be compiled when it is first used, once for all lengths of its batches.

    Hooks on its layers (those of FSDP2 and of `otpo.kernels.mixed_precision`) are not.
    """
    if model.shares_prompts:
        AttentionInterface.register(LEFT_ALONE, torch.compiler.disable(shared_prompts_attention))
        model.lm.set_attn_implementation(LEFT_ALONE)
    for layer in decoder_layers(model):
        for part in layer.modules():
            if type(part).__name__.endswith(PARTS_LEFT_ALONE):
                part.forward = torch.compiler.disable(part.forward)
        layer.forward = torch.compile(layer.forward, dynamic=True)
    model.passes = Passes(torch.compile(read, dynamic=True), torch.compile(differentiate, dynamic=True))


def check_compiler(where: str) -> None:
    """Raise a `UserError` if a CPU has no C++ compiler for `torch.compile`. GPUs bring their own."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"{where}: torch.compile needs a C++ compiler, and '{compiler}' is not to be found. Install one on every"
            " node, name it in the environment variable CXX, or leave the key out."
        )
