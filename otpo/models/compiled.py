"""`torch.compile` of the element-wise work between the matrix products: each tensor is read and written once.

Decoder layers are compiled, and the element-wise kernels over the vocabulary. Three parts of a layer are not:
- attention over shared prompts: its blocks follow the lengths of a batch, so every new batch would be compiled again;
- experts: how many tokens each one has is known only when they run;
- peft's wrapper of a bare parameter (LoRA on experts): its class is made anew in every pass.
"""

from __future__ import annotations

import os
import shutil
import sys

import torch
from transformers import AttentionInterface

from otpo.errors import UserError
from otpo.kernels.logprobs import VocabularyKernels, tile_gradient_, tile_logprobs
from otpo.models.attention import SHARED_PROMPTS, shared_prompts_attention
from otpo.models.policy import PolicyModel
from otpo.models.reward_model import RewardModel
from otpo.models.sharding import decoder_layers

UNCOMPILED_ATTENTION = f"{SHARED_PROMPTS}_uncompiled"
UNCOMPILED_ENDINGS = ("Experts", "ParamWrapper")  # of class names in transformers and peft


def compile_layers(model: PolicyModel | RewardModel) -> None:
    """Compile a model when it is first used, once for all lengths of its batches.

    The hooks on its layers (FSDP2's and those of `otpo.kernels.mixed_precision`) are not compiled.
    """
    if model.backbone.shares_prompts:
        AttentionInterface.register(UNCOMPILED_ATTENTION, torch.compiler.disable(shared_prompts_attention))
        model.lm.set_attn_implementation(UNCOMPILED_ATTENTION)
    for layer in decoder_layers(model):
        for part in layer.modules():
            if type(part).__name__.endswith(UNCOMPILED_ENDINGS):
                part.forward = torch.compiler.disable(part.forward)
        layer.forward = torch.compile(layer.forward, dynamic=True)
    if isinstance(model, PolicyModel):
        model.kernels = VocabularyKernels(
            torch.compile(tile_logprobs, dynamic=True), torch.compile(tile_gradient_, dynamic=True)
        )


def check_compiler(where: str) -> None:
    """Raise a `UserError` if a CPU has no C++ compiler for `torch.compile`. GPUs bring their own."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"{where}: torch.compile needs a C++ compiler, and '{compiler}' was not found. Install one on every node,"
            " name it in the environment variable CXX, or leave the key out."
        )
