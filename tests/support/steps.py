"""A few steps of a small model, and the weights that it has then."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from otpo.data.collate import collate_pairs
from otpo.methods.spec import resolve
from otpo.training.objectives.pair import preference_losses
from otpo.training.step import optimisation_step
from support.small_lm import PAIRS


def go(model, optimizer, steps=1, lr=1e-2):
    spec = resolve("simpo", {})
    found = preference_losses(model, spec, lambda batch: {}, seed=0)
    batch = [collate_pairs(PAIRS)]
    return [
        optimisation_step(model, optimizer, batch, found, denominator=3, max_grad_norm=1.0, lr=lr)["loss"]
        for _ in range(steps)
    ]


def weights(model) -> dict[str, torch.Tensor]:
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.named_parameters()}
