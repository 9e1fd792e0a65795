"""Losses against values worked out by hand from their papers' formulas."""

import math

import pytest
import torch
from support.losses import LENGTHS, run
from support.random_pairs import random_pair


def test_dpo_by_hand():
    pair = random_pair([2], [1])
    pair.chosen.policy, pair.chosen.frozen["reference"] = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -2.5]])
    pair.rejected.policy, pair.rejected.frozen["reference"] = torch.tensor([[-3.0]]), torch.tensor([[-1.0]])
    output = run("dpo", pair, beta=0.5)
    assert output.losses.item() == pytest.approx(math.log(1 + math.exp(-1.5)), rel=1e-6)
    expected = {"rewards/chosen": 0.5, "rewards/rejected": -1.0, "rewards/margins": 1.5, "rewards/accuracies": 1.0}
    expected |= {"logps/chosen": -3.0, "logps/rejected": -3.0}
    assert {name: output.metrics[name].item() for name in expected} == pytest.approx(expected)
    smooth = run("dpo", pair, beta=0.5, label_smoothing=0.25).losses.item()
    assert smooth == pytest.approx(0.75 * math.log(1 + math.exp(-1.5)) + 0.25 * math.log(1 + math.exp(1.5)), rel=1e-6)


@pytest.mark.parametrize(
    ("label", "loss"),
    [
        ("hinge", lambda x: max(0, 1 - x)),
        ("gpo-squared", lambda x: (1 - x) ** 2),
        ("gpo-exponential", lambda x: math.exp(-x)),
        ("gpo-truncated-quadratic", lambda x: max(0, 1 - x) ** 2),
        ("gpo-savage", lambda x: 1 / (1 + math.exp(x)) ** 2),
    ],
)
def test_generalised_preference_losses_by_hand(label, loss):
    pair = random_pair(*LENGTHS)
    output = run(label, pair, beta=0.4)
    margins = output.metrics["rewards/margins"].tolist()
    assert min(margins) < 0 and max(margins) > 1
    assert output.losses.tolist() == pytest.approx([loss(x) for x in margins], rel=1e-5, abs=1e-6)


def test_wpo_counts_pairs_by_how_likely_the_policy_says_both():
    pair = random_pair([2], [1], equal=True)
    pair.chosen.policy = pair.chosen.frozen["reference"] = torch.tensor([[0.5, 0.2]]).log()
    pair.rejected.policy = pair.rejected.frozen["reference"] = torch.tensor([[0.1]]).log()
    pair.chosen.vocabulary = {"log_sum_squares": torch.tensor([[0.5, 0.4]]).log()}
    pair.rejected.vocabulary = {"log_sum_squares": torch.tensor([[0.4]]).log()}
    output = run("wpo", pair)
    weight = math.sqrt(0.5 / 0.5 * 0.2 / 0.4) * 0.1 / 0.4
    assert output.metrics["wpo_weight"].item() == pytest.approx(weight, rel=1e-6)
    assert output.losses.item() == pytest.approx(weight * math.log(2), rel=1e-6)


def test_tdpo_by_hand_and_where_its_gradient_flows():
    for label, settings, scale in (("tdpo1", {}, 1.0), ("tdpo2", {"tdpo_alpha": 0.3}, 0.3)):
        pair = random_pair(*LENGTHS)
        divergences = [side.vocabulary["reference_kl"].requires_grad_() for side in (pair.chosen, pair.rejected)]
        output = run(label, pair, beta=0.4, **settings)
        kl_chosen, kl_rejected = (kl.detach().sum(-1) for kl in divergences)
        logits = output.metrics["rewards/margins"] - 0.4 * scale * (kl_rejected - kl_chosen)
        torch.testing.assert_close(output.losses, torch.log1p(torch.exp(-logits)))
        torch.testing.assert_close(output.metrics["kl/chosen"], kl_chosen)
        of_chosen, of_rejected = torch.autograd.grad(output.losses.sum(), divergences, allow_unused=True)
        slope = 0.4 * scale * torch.sigmoid(-logits)[:, None]
        torch.testing.assert_close(of_rejected, slope * pair.rejected.mask)
        if label == "tdpo1":
            torch.testing.assert_close(of_chosen, -slope * pair.chosen.mask)
        else:
            assert of_chosen is None, "TDPO2 has no gradient through the chosen completion's divergence"


def test_dpop_by_hand():
    pair = random_pair([2, 1], [1, 1])
    pair.chosen.policy, pair.chosen.frozen["reference"] = (
        torch.tensor([[-1.0, -2.0], [-1.0, 0]]),
        torch.tensor([[-0.5, -2.25], [-2.0, 0]]),
    )
    pair.rejected.policy = pair.rejected.frozen["reference"] = torch.tensor([[-3.0], [-1.0]])
    losses = run("dpop", pair, beta=2.0, dpop_lambda=10.0).losses.tolist()
    assert losses[0] == pytest.approx(math.log(1 + math.exp(2 * (0.25 + 2.5))), rel=1e-6)
    assert losses[1] == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6), "more likely than before: DPO"


def test_summed_ipo_by_hand():
    pair = random_pair(*LENGTHS)
    margins = run("ipo-sum", pair, beta=0.2).metrics["rewards/margins"] / 0.2
    torch.testing.assert_close(run("ipo-sum", pair, beta=0.2).losses, (margins - 2.5) ** 2)


def test_orpo_without_odds_is_supervised_training():
    pair = random_pair([4, 2], [3, 5])
    expected = -torch.stack([pair.chosen.policy[0].mean(), pair.chosen.policy[1, :2].mean()])
    torch.testing.assert_close(run("orpo", pair, orpo_lambda=0).losses, expected)


def test_confpo_by_hand_and_pairs_without_a_selected_token():
    pair = random_pair([3, 3], [2, 1])
    pair.chosen.policy = torch.tensor([[0.9, 0.2, 0.1], [0.9, 0.2, 0.1]]).log()
    pair.rejected.policy = torch.tensor([[0.5, 0.4], [0.3, 1.0]]).log()
    losses = run("confpo", pair, beta=2.0, gamma_beta_ratio=0.5).losses.tolist()
    margin = (math.log(0.2) + math.log(0.1)) / 2 - math.log(0.4)
    assert losses == pytest.approx([math.log(1 + math.exp(-2 * (margin - 0.5))), 0.0], rel=1e-5)


def test_tgdpo_by_hand():
    pair = random_pair([2], [1])
    for side, policy, reference, oracle in (
        (pair.chosen, [-1.0, -2.0], [-1.5, -2.5], [-0.5, -3.5]),
        (pair.rejected, [-3.0], [-1.0], [-2.0]),
    ):
        side.policy = torch.tensor([policy])
        side.frozen = {"reference": torch.tensor([reference]), "oracle": torch.tensor([oracle])}
    beta, alpha = 0.2, 0.5
    chosen = 0.5 * (1 + alpha * beta * 1.0) + 0.5 * (1 + alpha * beta * -1.0)
    rejected = -2.0 * (1 - alpha * beta * -1.0)
    output = run("tgdpo", pair, beta=beta, tgdpo_alpha=alpha)
    assert output.losses.item() == pytest.approx(math.log(1 + math.exp(-beta * (chosen - rejected))), rel=1e-6)


def test_sepo_by_hand():
    pair = random_pair([4], [3])
    for side, policy, scores in (
        (pair.chosen, [-1.0, -2.0, -3.0, -4.0], [0.1, 0.9, -0.5, 0.8]),
        (pair.rejected, [-1.5, -2.5, -0.5], [0.3, -0.2, 0.6]),
    ):
        side.policy = torch.tensor([policy])
        side.frozen = {"reference": torch.zeros_like(side.policy), "oracle": torch.tensor([scores])}
    losses = run("sepo", pair, keep_ratio=0.5).losses
    margin = (-2.0 - 4.0) / 2 - -2.5
    assert losses.item() == pytest.approx(math.log(1 + math.exp(-margin)), rel=1e-6)


def test_cpo_adds_the_likelihood_of_the_chosen_completion():
    pair = random_pair([4, 2], [3, 5])
    difference = run("cpo", pair, cpo_alpha=0.5).losses - run("cpo", pair, cpo_alpha=0).losses
    torch.testing.assert_close(
        difference, -0.5 * torch.stack([pair.chosen.policy[0].mean(), pair.chosen.policy[1, :2].mean()])
    )
