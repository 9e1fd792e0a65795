"""Losses of single completions, each labelled desirable or not.

Notation: r = sum_t (log pi_t - log pi_ref,t) of a completion. Every loss takes B completions and returns B losses,
unreduced. What it must know of the whole global batch is collected first and handed to it as `global_values`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from otpo.records import LogProbs, LossOutput


def kto(
    answers: LogProbs,
    labels: Tensor,
    global_values: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> LossOutput:
    """lambda_D (1 - sigma(beta (r - z))) of desirable completions, lambda_U (1 - sigma(beta (z - r))) of the others.

    KTO, eq. 7 of https://arxiv.org/abs/2402.01306; 0.5 lambda each where the policy is the reference. z is an
    estimate of KL(pi | pi_ref), without gradient: the mean r, at least 0, of prompts with completions that belong to
    other prompts, over the global batch. TRL and the official code (`KTOTrainer` in
    https://github.com/ContextualAI/HALOs/blob/main/train/trainers.py) take the mean over a micro-batch of each worker.

    Args:
        answers: B completions with the "reference" scorer.
        labels: (B,) bool, True for desirable ones.
        global_values: (n, 2) `kto_values` of all n completions of the global batch.
        beta: how strongly the policy is kept to the reference.
        desirable_weight, undesirable_weight: lambda_D and lambda_U. With n_D and n_U completions of either kind, the
            paper (eq. 8) keeps lambda_D n_D / (lambda_U n_U) between 1 and 4/3.
    """
    ratio = log_ratio(answers)
    z = global_values[:, 0].mean().clamp(min=0)
    weight = torch.where(labels, desirable_weight, undesirable_weight).to(ratio.dtype)
    losses = weight * torch.sigmoid(-beta * torch.where(labels, ratio - z, z - ratio))
    figures = {"rewards": beta * ratio.detach(), "logps": answers.policy.detach().sum(-1), "lengths": answers.lengths}
    metrics = {"kl": z.expand(len(ratio))}
    for name, values in figures.items():
        metrics |= by_label(name, values, labels, global_values[:, 1])
    if {"rewards/chosen", "rewards/rejected"} <= set(metrics):
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return LossOutput(losses, metrics)


def kto_values(mismatched: LogProbs, labels: Tensor) -> Tensor:
    """(B, 2) r of a prompt with a completion of another one, and the label (0 or 1) of the prompt's own completion."""
    ratio = log_ratio(mismatched).detach()
    return torch.stack([ratio, labels.to(ratio.dtype)], dim=-1)


def log_ratio(answers: LogProbs) -> Tensor:
    """(B,) r of completions."""
    return (answers.policy - answers.frozen_logps("reference")).sum(-1)


def by_label(name: str, values: Tensor, labels: Tensor, global_values: Tensor) -> dict[str, Tensor]:
    """Figures `<name>/chosen` of desirable and `<name>/rejected` of undesirable completions, TRL's names.

    They are scaled so that their mean over all completions of the global batch is the mean over those of the label. A
    label that the global batch lacks has no figure.

    Args:
        name: of the figure. values: (B,). labels: (B,) bool. global_values: (n,) labels of the global batch, 0 or 1.
    """
    counts = {"chosen": global_values.sum().item(), "rejected": (1 - global_values).sum().item()}
    masks = {"chosen": labels, "rejected": ~labels}
    return {
        f"{name}/{side}": torch.where(masks[side], values, 0.0) * (len(global_values) / count)
        for side, count in counts.items()
        if count
    }
