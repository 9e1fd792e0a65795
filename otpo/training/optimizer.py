"""The optimizer."""

from __future__ import annotations

import torch
from torch import nn
from torch.autograd.graph import increment_version


def adamw(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trained weights. Norms and biases do not decay, as with transformers' Trainer."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)
    # the fused kernel does not raise the version counters by which `otpo.kernels.mixed_precision` sees an update
    optimizer.register_step_post_hook(lambda *_: increment_version(trained))
    return optimizer
