"""Losses of single completions, each labelled desirable or not.

Notation: r = sum_t (log pi_t - log pi_ref,t) of a completion.

Every loss takes B completions and returns B losses, unreduced. Each loss has a `*_values` function; the step first
collects its values over the whole global batch and passes them to the loss as `global_values`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from otpo.records import LogProbs, LossOutput


def kto(
    completions: LogProbs,
    labels: Tensor,
    global_values: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> LossOutput:
    """lambda_D (1 - sigma(beta (r - z))) for desirable completions, lambda_U (1 - sigma(beta (z - r))) for others.

    KTO, eq. 7 of https://arxiv.org/abs/2402.01306; 0.5 lambda each where the policy is the reference. z estimates
    KL(pi | pi_ref), without gradient: the mean r, at least 0, of prompts with completions that belong to other prompts,
    over the global batch. TRL and the official code (`KTOTrainer` in
    https://github.com/ContextualAI/HALOs/blob/main/train/trainers.py) take the mean over each worker's micro-batch.

    Args:
        completions: B completions with the log-probabilities of "reference".
        labels: (B,) bool, True for desirable ones.
        global_values: (n, 2) `kto_values` of all n completions of the global batch.
        beta: scale of the rewards beta r.
        desirable_weight, undesirable_weight: lambda_D and lambda_U. With n_D desirable and n_U undesirable completions,
            the paper (eq. 8) keeps lambda_D n_D / (lambda_U n_U) between 1 and 4/3.
    """
    ratio = log_ratio(completions)
    z = global_values[:, 0].mean().clamp(min=0)
    weight = torch.where(labels, desirable_weight, undesirable_weight).to(ratio.dtype)
    losses = weight * torch.sigmoid(-beta * torch.where(labels, ratio - z, z - ratio))
    figures = {
        "rewards": beta * ratio.detach(),
        "logps": completions.policy.detach().sum(-1),
        "lengths": completions.lengths,
    }
    metrics = {"kl": z.expand(len(ratio))}
    for name, values in figures.items():
        metrics |= by_label(name, values, labels, global_values[:, 1])
    if {"rewards/chosen", "rewards/rejected"} <= set(metrics):
        metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return LossOutput(losses, metrics)


def kto_values(mismatched: LogProbs, labels: Tensor) -> Tensor:
    """(B, 2) r of each prompt with another prompt's completion, and the label (0 or 1) of its own completion."""
    ratio = log_ratio(mismatched).detach()
    return torch.stack([ratio, labels.to(ratio.dtype)], dim=-1)


def log_ratio(completions: LogProbs) -> Tensor:
    """(B,) r of each completion."""
    return (completions.policy - completions.frozen_logps("reference")).sum(-1)


def by_label(name: str, values: Tensor, labels: Tensor, global_labels: Tensor) -> dict[str, Tensor]:
    """The metrics `<name>/chosen` of desirable and `<name>/rejected` of undesirable completions, TRL's names.

    They are scaled so that their mean over all completions of the global batch is the mean over those with the label.
    A label that does not occur in the global batch has no metric.

    Args:
        name: of the metric. values: (B,). labels: (B,) bool. global_labels: (n,) labels of the global batch, 0 or 1.
    """
    counts = {"chosen": global_labels.sum().item(), "rejected": (1 - global_labels).sum().item()}
    masks = {"chosen": labels, "rejected": ~labels}
    return {
        f"{name}/{side}": torch.where(masks[side], values, 0.0) * (len(global_labels) / count)
        for side, count in counts.items()
        if count
    }
