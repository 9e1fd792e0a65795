"""The loss of a reward model, which takes two completions' scores, not log-probabilities.

Notation: r_w and r_l are the scores of the chosen and of the rejected completion.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from otpo.records import LossOutput


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, *, center_rewards_coefficient: float
) -> LossOutput:
    """-log sigma(r_w - r_l - m) + c (r_w + r_l)^2; log 2 where both scores and the margin are 0.

    The model of Bradley and Terry as in eq. 1 of https://arxiv.org/abs/2203.02155; the margin m is eq. 2 of Llama 2,
    https://arxiv.org/abs/2307.09288. The first term depends on differences of scores only, so each training
    run has its own zero; the second term draws scores to mean 0 (eq. 2 of https://arxiv.org/abs/2312.09244). As TRL's
    `RewardTrainer`.

    Args:
        chosen, rejected: (B,) r_w and r_l.
        margins: (B,) m, how much better the chosen completion is; None is 0.
        center_rewards_coefficient: c; the paper takes 0.01.
    """
    difference = chosen - rejected
    losses = -logsigmoid(difference if margins is None else difference - margins)
    if center_rewards_coefficient:
        losses = losses + center_rewards_coefficient * (chosen + rejected).square()
    chosen, rejected, difference = chosen.detach(), rejected.detach(), difference.detach()
    return LossOutput(
        losses,
        {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": difference,
            "rewards/accuracies": (difference > 0).to(difference.dtype),
            "mean_reward": (chosen + rejected) / 2,
        },
    )
