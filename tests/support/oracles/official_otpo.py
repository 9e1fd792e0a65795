"""The official code's token weights, by POT: the oracle of the transport's and the command's tests."""

import ot
import torch


def official_weights(hidden_chosen, hidden_rejected, mask_chosen, mask_rejected, reg, reg_m):
    """Weights over all L - 1 predicting positions, as scripts/otpo_trainer.py takes them: prompt and padding zeroed.

    Distances are exact ones in float64 and POT runs on to the fixed point; the official code has neither.
    """
    p = (hidden_chosen * mask_chosen[:, None]).double()
    q = (hidden_rejected * mask_rejected[:, None]).double()
    cost = torch.cdist(p, q, p=2, compute_mode="donot_use_mm_for_euclid_dist") + 1e-6
    largest = cost.abs().max()
    if largest > 1:
        cost /= largest
    a, b = mask_chosen.double(), mask_rejected.double()
    # c = 1 is reg_type="entropy", the default of the official code's POT 0.9.4.
    options = dict(method="sinkhorn_stabilized", c=torch.ones_like(cost), stopThr=1e-12, numItermax=10_000)
    plan = ot.unbalanced.sinkhorn_unbalanced(a, b, cost, reg, (reg_m,), **options)
    scale = plan.sum() / torch.minimum(a.sum(), b.sum())
    return plan.sum(1) / scale, plan.sum(0) / scale
