"""The OTPO rule: token weights from optimal transport between the hidden states of a pair's two completions.

The cost matrix and the Sinkhorn solver are in `transport`.

Shape legend: B pairs, M and N padded lengths of the chosen and rejected completions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from otpo.methods.weights.transport import SOLVERS, cost_matrix
from otpo.records import PairLogProbs, TokenWeights


def transport_log_plan(
    pair: PairLogProbs,
    *,
    reg: float,
    reg_m: float,
    cost: str = "l2",
    normalizer: str = "official",
    solver: str = "batched",
    iterations: int = 0,
    tolerance: float = 1e-9,
) -> Tensor:
    """(B, M, N) log of the unbalanced transport plan between the completions' hidden states, mass 1 on every token.

    Another mass, such as 1 / length, would scale the whole plan and leave the weights as they are.

    Args:
        pair: B pairs with hidden states.
        reg, reg_m: entropic regularisation of the plan; penalty on its marginals.
        cost, normalizer: see `cost_matrix`.
        solver: "batched" (`sinkhorn_unbalanced`), or "pot" (`sinkhorn_pot`).
        iterations: of the solver; 0 takes as many as `tolerance` needs.
        tolerance: factor by which the initial error of the log-potentials shrinks.

    Raises:
        ValueError: `pair` has no hidden states.
    """
    if pair.chosen.hidden is None or pair.rejected.hidden is None:
        raise ValueError("optimal transport needs the policy's hidden states; compute the record with `hidden`")
    costs = cost_matrix(
        pair.chosen.hidden,
        pair.rejected.hidden,
        pair.chosen.mask,
        pair.rejected.mask,
        cost=cost,
        normalizer=normalizer,
    )
    a, b = (side.mask.to(costs.dtype) for side in (pair.chosen, pair.rejected))
    largest = math.inf if normalizer == "none" else 1.0
    return SOLVERS[solver](
        costs, a, b, reg=reg, reg_m=reg_m, iterations=iterations or None, tol=tolerance, largest_cost=largest
    )


def otpo(
    pair: PairLogProbs,
    *,
    seed: int = 0,
    reg: float,
    reg_m: float,
    cost: str = "l2",
    normalizer: str = "official",
    solver: str = "batched",
    iterations: int = 0,
    tolerance: float = 1e-9,
    layer: int = -1,
    total: str = "shorter",
) -> TokenWeights:
    """w_chosen = c G 1 and w_rejected = c G^T 1 of the transport plan G, with c = min(m, n) / sum(G).

    OTPO (ACL 2025, https://aclanthology.org/2025.acl-long.1035), as in the official `OTPOTrainer`. Both
    sides have the same sum; a pair with an empty side has weights 0. Adds the metric `weights/transport_mass`: the
    plan's mass over min(m, n), the official `logps/scaled_coeff`.

    Args:
        pair: B pairs with hidden states.
        seed: not used.
        reg, reg_m, cost, normalizer, solver, iterations, tolerance: see `transport_log_plan`.
        layer: not used here: `pair` already holds this layer's states (see `MethodSpec.layer`).
        total: what each side sums to: "shorter", min(m, n) of the sides' m and n tokens, as in the official code; or
            "one", for losses of means over tokens.
    """
    log_plan = transport_log_plan(
        pair, reg=reg, reg_m=reg_m, cost=cost, normalizer=normalizer, solver=solver, iterations=iterations,
        tolerance=tolerance,
    )  # fmt: skip
    shorter = torch.minimum(pair.chosen.lengths, pair.rejected.lengths).to(log_plan.dtype)
    log_mass = log_plan.flatten(1).logsumexp(1).masked_fill(shorter == 0, 0.0)
    scale = shorter if total == "shorter" else (shorter > 0).to(shorter)
    plan = (log_plan - log_mass[:, None, None]).exp() * scale[:, None, None]
    transported = torch.where(shorter > 0, log_mass.exp() / shorter, 0.0)
    dtype = pair.chosen.policy.dtype
    return TokenWeights(plan.sum(2).to(dtype), plan.sum(1).to(dtype), {"weights/transport_mass": transported.to(dtype)})
