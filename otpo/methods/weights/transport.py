"""Optimal transport between the tokens of two completions: the cost matrix and the unbalanced Sinkhorn solvers.

Costs are float64, whatever the model's precision: in float32 the distance between nearly equal tokens is rounding noise
(`torch.cdist`'s |p|^2 + |q|^2 - 2pq changes OTPO's weights by up to 1e-3), and a float64 matrix product is still
several times faster than computing each difference. The solver's iterations may be float32: their error shrinks like
any other error of the potentials, and 1e-6 of it changes weights by less than 1e-5. A GPU takes them so, compiled.

Shape legend: B pairs, M and N padded lengths of the chosen and rejected completions, D hidden size.
Source: https://github.com/Mimasss2/OTPO (scripts/otpo_trainer.py); the solver is Chizat et al. 2018, Algorithm 2.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from otpo.errors import UserError
from otpo.kernels.cpu import uses_cpu_kernels
from otpo.methods.iterations import LARGEST_COST_OF_POT, iterations_for, not_by_pot

COST_OFFSET = 1e-6  # added to every distance by the official code
LARGEST_EXPONENT = {torch.float64: 700.0, torch.float32: 80.0}  # exp of its negative is still a normal number
FLOAT32_TOLERANCE = 1e-6  # of the log-potentials, the least that float32 reaches
UNROLLED = 8  # iterations of the compiled solver in one piece


def cost_matrix(
    chosen: Tensor,
    rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    *,
    cost: str = "l2",
    normalizer: str = "official",
) -> Tensor:
    """The cost of moving each chosen token onto each rejected token.

    Args:
        chosen: (B, M, D) hidden states; any value where masked.
        rejected: (B, N, D).
        chosen_mask: (B, M) bool.
        rejected_mask: (B, N) bool.
        cost: "l2", "sqeuclidean" or "cosine" (1 - cos).
        normalizer: what a pair's costs are divided by where it exceeds 1. "official": the maximum over the costs and
            over each token's cost to the zero vector, as in the official code (its matrix keeps prompt and padding as
            zero vectors, for prompts of two tokens or more). "valid": the maximum over the completion tokens' costs
            alone. "none": nothing.

    Returns:
        (B, M, N) float64 costs, zero where either token is masked, without gradient; at most 1 unless the normalizer
        is "none".

    Raises:
        ValueError: an unknown `cost` or `normalizer`.
    """
    with torch.no_grad():
        p, q = chosen.double(), rejected.double()
        if cost == "cosine":
            p, q = torch.nn.functional.normalize(p, dim=-1), torch.nn.functional.normalize(q, dim=-1)
        elif cost not in ("l2", "sqeuclidean"):
            raise ValueError(f"cost must be 'l2', 'sqeuclidean' or 'cosine', not {cost!r}")
        costs = torch.cdist(p, q, compute_mode="use_mm_for_euclid_dist")
        to_zero = [x.norm(dim=-1) for x in (p, q)]
        if cost == "sqeuclidean":
            costs, to_zero = costs.square(), [x.square() for x in to_zero]
        elif cost == "cosine":  # |p - q|^2 = 2 - 2 cos on the unit sphere
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


def sinkhorn_unbalanced(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    reg: float,
    reg_m: float,
    iterations: int | None = None,
    tol: float = 1e-9,
    largest_cost: float = math.inf,
    precision: torch.dtype | None = None,
) -> Tensor:
    """Unbalanced entropic transport of a batch of pairs, in the log domain.

    Minimises <G, C> + reg sum(G log G - G) + reg_m (KL(G 1 | a) + KL(G^T 1 | b)), which is POT's
    `sinkhorn_unbalanced(..., reg_type="entropy")`. The number of iterations is fixed in advance, so the host never
    waits for the device.

    Args:
        cost: (B, M, N).
        a: (B, M) masses, 0 where masked.
        b: (B, N) masses, 0 where masked.
        reg: entropic regularisation > 0.
        reg_m: penalty on the marginals > 0; a smaller one lets more mass stay where it is.
        iterations: None derives the number from `tol`.
        tol: factor by which the initial error of the log-potentials must shrink.
        largest_cost: an upper bound of `cost`, if known. If it shows that exp(-cost / reg) cannot underflow, each
            iteration is a matrix product (ten times faster on a CPU) instead of a log-sum-exp.
        precision: of the iterations; float32 reaches `FLOAT32_TOLERANCE`. By default float64 on a CPU and float32 on a
            GPU.

    Returns:
        (B, M, N) float64 logarithm of the transport plan, -inf where masked. The plan itself may underflow where costs
        are large; its proportions do not.
    """
    with torch.no_grad():
        cost, a, b = cost.double(), a.double(), b.double()
        if 0 in cost.shape:
            return cost
        on_cpu = uses_cpu_kernels(cost)
        precision = precision or (torch.float64 if on_cpu else torch.float32)
        if precision == torch.float32:
            tol = max(tol, FLOAT32_TOLERANCE)
        count = iterations_for(tol, reg, reg_m) if iterations is None else iterations
        valid = (a > 0)[:, :, None] & (b > 0)[:, None, :]
        kernel = (cost / -reg).masked_fill(~valid, -torch.inf)
        # the potentials spread at most as far as the kernel, hence the 2
        scaled = 2 * largest_cost / reg <= LARGEST_EXPONENT[precision]
        matrix = (kernel.exp() if scaled else kernel).to(precision)
        no_row, no_column = ~valid.any(2), ~valid.any(1)
        state = (
            matrix, a.log().to(precision), b.log().to(precision), no_row, no_column, reg_m / (reg_m + reg), scaled
        )  # fmt: skip
        f = torch.zeros_like(a, dtype=precision)
        g = torch.zeros_like(b, dtype=precision).masked_fill(no_column, -torch.inf)
        iterate = _iterate if on_cpu else _compiled_iterate()
        for start in range(0, count, UNROLLED):
            f, g = iterate(*state, f, g, min(UNROLLED, count - start))
        return kernel + f.double()[:, :, None] + g.double()[:, None, :]


def _iterate(
    matrix: Tensor,
    log_a: Tensor,
    log_b: Tensor,
    no_row: Tensor,
    no_column: Tensor,
    exponent: float,
    scaled: bool,
    f: Tensor,
    g: Tensor,
    count: int,
) -> tuple[Tensor, Tensor]:
    """Some Sinkhorn iterations of the log-potentials f (B, M) and g (B, N).

    Args:
        matrix: (B, M, N) the kernel, exponentiated if `scaled`.
        log_a, log_b: logarithms of the masses.
        no_row, no_column: which tokens have no mass or no partner.
        exponent: reg_m / (reg_m + reg).
    """

    def log_product(matrix: Tensor, potential: Tensor) -> Tensor:
        """log(exp(kernel) @ exp(potential)) for each pair."""
        if not scaled:
            return (matrix + potential[:, None, :]).logsumexp(2)
        top = potential.amax(1, keepdim=True)
        return (matrix @ (potential - top).exp()[:, :, None])[:, :, 0].log() + top

    for _ in range(count):
        f = (exponent * (log_a - log_product(matrix, g))).masked_fill(no_row, -torch.inf)
        g = (exponent * (log_b - log_product(matrix.mT, f))).masked_fill(no_column, -torch.inf)
    return f, g


@functools.cache
def _compiled_iterate() -> Callable[..., tuple[Tensor, Tensor]]:
    """`_iterate` compiled: launches, not arithmetic, are what it costs on a GPU."""
    return torch.compile(_iterate, dynamic=True)


def sinkhorn_pot(
    cost: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    reg: float,
    reg_m: float,
    iterations: int | None = None,
    tol: float = 1e-9,
    largest_cost: float = math.inf,
) -> Tensor:
    """`sinkhorn_unbalanced` by POT, pair by pair in float64 on the CPU: the reference solver.

    POT's "sinkhorn_stabilized", which the official code calls, has the same fixed point and reaches it at the paper's
    settings; at reg <= 0.03 its stopping rule and its absorption step can leave it far away. All of POT's solvers take
    exp(-cost / reg), and where that underflows they warn and return zeros or the plan of an earlier iteration.

    Raises:
        UserError: `reg` is too small for the costs.
    """
    import ot

    log_plan = torch.full_like(cost, -torch.inf, dtype=torch.float64)
    for index in range(cost.shape[0]):
        rows, columns = (a[index] > 0).nonzero()[:, 0], (b[index] > 0).nonzero()[:, 0]
        if not len(rows) or not len(columns):
            continue
        block = cost[index][rows][:, columns].double().cpu().numpy()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            plan = ot.unbalanced.sinkhorn_unbalanced(
                a[index][rows].double().cpu().numpy(),
                b[index][columns].double().cpu().numpy(),
                block,
                reg,
                reg_m,
                method="sinkhorn",
                c=block * 0 + 1,  # the entropy's reference measure; POT's own would be a b^T
                numItermax=iterations_for(tol, reg, reg_m) if iterations is None else iterations,
                stopThr=0.0,  # its error is relative to the largest scaling, and misses small ones
            )
        broken = any("Numerical errors" in str(each.message) for each in told)
        if broken or block.max() > LARGEST_COST_OF_POT * reg:
            raise UserError(not_by_pot(reg, float(block.max())))
        log_plan[index, rows[:, None], columns[None, :]] = torch.as_tensor(plan).log().to(log_plan)
    return log_plan


SOLVERS: dict[str, Callable[..., Tensor]] = {"batched": sinkhorn_unbalanced, "pot": sinkhorn_pot}
