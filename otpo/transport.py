"""Optimal transport between the tokens of two answers: costs and unbalanced entropic solvers.

Shape legend: B pairs, M and N padded lengths of the chosen and rejected completions, D hidden size.
Source: https://github.com/Mimasss2/OTPO (scripts/otpo_trainer.py); the solver is Chizat et al. 2018, Algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

COST_OFFSET = 1e-6  # added to every distance by the official code


def cost_matrix(
    chosen: Tensor,
    rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    cost: str = "l2",
    normalizer: str = "official",
) -> Tensor:
    """Costs of moving each chosen token onto each rejected token.

    Distances are taken without a matrix product: for tokens that are nearly alike, `|p|^2 + |q|^2 - 2pq` in float32 is
    rounding noise whose square root changes OTPO's weights by up to 1e-3.

    Args:
        chosen: (B, M, D) hidden states; any value where masked.
        rejected: (B, N, D).
        chosen_mask: (B, M) bool.
        rejected_mask: (B, N) bool.
        cost: "l2", "sqeuclidean" or "cosine" (1 - cos).
        normalizer: what a pair's costs are divided by where it exceeds 1: "official" takes the maximum over the costs
            and over each token's cost to the zero vector, which is what the official code's full padded matrix amounts
            to (it zeroes prompt and padding, it does not remove them, for prompts of two tokens or more); "valid" takes
            the maximum over the completion tokens' costs alone; "none" divides by nothing.

    Returns:
        (B, M, N) costs, float32 (float64 for float64 input), zero where either token is masked, without gradient.
    """
    with torch.no_grad():
        dtype = torch.promote_types(chosen.dtype, torch.float32)
        p, q = chosen.detach().to(dtype), rejected.detach().to(dtype)
        if cost == "cosine":
            p, q = torch.nn.functional.normalize(p, dim=-1), torch.nn.functional.normalize(q, dim=-1)
        elif cost not in ("l2", "sqeuclidean"):
            raise ValueError(f"cost must be 'l2', 'sqeuclidean' or 'cosine', not {cost!r}")
        costs = torch.cdist(p, q, compute_mode="donot_use_mm_for_euclid_dist")
        to_zero = [x.norm(dim=-1) for x in (p, q)]
        if cost == "sqeuclidean":
            costs, to_zero = costs.square(), [x.square() for x in to_zero]
        elif cost == "cosine":  # |p - q|^2 = 2 - 2 cos on the unit sphere, exact also for tokens that are alike
            costs = costs.square() / 2
        valid = chosen_mask[:, :, None] & rejected_mask[:, None, :]
        costs = (costs + COST_OFFSET).masked_fill(~valid, 0.0)
        if normalizer == "none" or 0 in costs.shape:
            return costs
        largest = costs.flatten(1).amax(-1)
        if normalizer == "official":
            for norms, mask in zip(to_zero, (chosen_mask, rejected_mask), strict=True):
                largest = torch.maximum(largest, norms.masked_fill(~mask, 0.0).amax(-1) + COST_OFFSET)
        elif normalizer != "valid":
            raise ValueError(f"normalizer must be 'official', 'valid' or 'none', not {normalizer!r}")
        return costs / largest.clamp(min=1.0)[:, None, None]


def iterations_for(tol: float, reg: float, reg_m: float) -> int:
    """Sinkhorn iterations after which the log-potentials' error has shrunk by `tol`.

    One iteration contracts it by (reg_m / (reg + reg_m))^2 in the sup norm.
    """
    return max(1, math.ceil(math.log(tol) / (2 * math.log(reg_m / (reg + reg_m)))))


def sinkhorn_unbalanced(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    reg: float,
    reg_m: float,
    iterations: int | None = None,
    tol: float = 1e-9,
) -> Tensor:
    """Unbalanced entropic transport of a batch of pairs, in the log domain.

    Minimises <G, C> + reg sum(G log G - G) + reg_m (KL(G 1 | a) + KL(G^T 1 | b)), which is POT's
    `sinkhorn_unbalanced(..., reg_type="entropy")`. The number of iterations is fixed beforehand, so the device is never
    waited for.

    Args:
        cost: (B, M, N).
        a: (B, M) masses, 0 where masked.
        b: (B, N) masses, 0 where masked.
        reg: entropic regularisation > 0.
        reg_m: penalty on the marginals > 0; the smaller, the more mass may stay where it is.
        iterations: how many; None derives it from `tol`.
        tol: how much the initial error of the log-potentials must shrink.

    Returns:
        (B, M, N) transport plan, zero where masked and for pairs with an empty side.
    """
    with torch.no_grad():
        mask_a, mask_b = a > 0, b > 0
        valid = mask_a[:, :, None] & mask_b[:, None, :]
        if 0 in cost.shape:
            return torch.zeros_like(cost)
        kernel = (cost / -reg).masked_fill(~valid, -torch.inf)
        # Rows that may carry mass; the others' potentials are held at 0 so that no infinities meet.
        rows, columns = valid.any(2), valid.any(1)
        log_a, log_b = a.masked_fill(~mask_a, 1.0).log(), b.masked_fill(~mask_b, 1.0).log()
        exponent = reg_m / (reg_m + reg)
        g = torch.zeros_like(b)
        for _ in range(iterations_for(tol, reg, reg_m) if iterations is None else iterations):
            f = (exponent * (log_a - (kernel + g[:, None, :]).logsumexp(2))).masked_fill(~rows, 0.0)
            g = (exponent * (log_b - (kernel + f[:, :, None]).logsumexp(1))).masked_fill(~columns, 0.0)
        return (kernel + f[:, :, None] + g[:, None, :]).exp()


def sinkhorn_pot(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    reg: float,
    reg_m: float,
    iterations: int | None = None,
    tol: float = 1e-9,
) -> Tensor:
    """The plan of `sinkhorn_unbalanced` by POT, pair after pair in float64 on the CPU: the reference solver."""
    import ot

    plan = torch.zeros_like(cost)
    for index in range(cost.shape[0]):
        rows, columns = (a[index] > 0).nonzero()[:, 0], (b[index] > 0).nonzero()[:, 0]
        if not len(rows) or not len(columns):
            continue
        block = cost[index][rows][:, columns].double().cpu().numpy()
        solution = ot.unbalanced.sinkhorn_unbalanced(
            a[index][rows].double().cpu().numpy(),
            b[index][columns].double().cpu().numpy(),
            block,
            reg,
            reg_m,
            method="sinkhorn_stabilized",
            c=block * 0 + 1,  # the entropy's reference measure; POT's own would be a b^T
            numItermax=iterations or 100_000,
            stopThr=tol,
        )
        plan[index, rows[:, None], columns[None, :]] = torch.as_tensor(solution).to(plan)
    return plan


SOLVERS: dict[str, Callable[..., Tensor]] = {"batched": sinkhorn_unbalanced, "pot": sinkhorn_pot}
