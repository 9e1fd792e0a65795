"""The optimizer: AdamW, its states in float32 or in 8 bits."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from otpo.errors import UserError

ADAMW, EIGHT_BIT = "adamw", "adamw_8bit"
# B of the two moments of a weight. In 8 bits, each block of 256 values has a float32 scale beside them.
STATE_BYTES = {ADAMW: 8.0, EIGHT_BIT: 2 * (1 + 4 / 256)}


def adamw(model: nn.Module, *, lr: float, weight_decay: float, name: str = ADAMW) -> torch.optim.Optimizer:
    """AdamW over the trained weights. Norms and biases do not decay, as with transformers' Trainer.

    Args:
        name: "adamw"; or "adamw_8bit", torchao's AdamW with the states of https://arxiv.org/abs/2110.02861. Those of
            weights (or of their shards) of fewer than 4,096 values, or of no whole number of blocks of 256, stay in
            float32. Its arithmetic is float32 too, in kernels that torch compiles for each shape of a weight.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer: torch.optim.Optimizer
    if name == EIGHT_BIT:
        from torchao.optim import AdamW8bit

        optimizer = AdamW8bit(groups, lr=lr)
    else:
        optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    # the fused kernel does not raise the version counters by which `otpo.kernels.mixed_precision` sees an update
    optimizer.register_step_post_hook(lambda *_: increment_version(trained))
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all weights; a compiled optimizer has it in a tensor, and reads no other."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def check_optimizer(name: str, *, gpu: bool) -> None:
    """Refuse an optimizer that this machine lacks something for.

    Args:
        name: `train.optimizer` of the recipe.
        gpu: whether training will have a CUDA device.

    Raises:
        UserError: torchao is not installed, or a CPU has no C++ compiler.
    """
    if name != EIGHT_BIT:
        return
    if importlib.util.find_spec("torchao") is None:
        raise UserError(
            f"train.optimizer is {name}, which needs torchao; it is not installed. Run `pip install torchao==0.18.0` in"
            f" this environment, or set train.optimizer={ADAMW}."
        )
    if not gpu:
        from otpo.models.compiled import check_compiler

        check_compiler("train.optimizer")
