"""Losses at policy == reference, their special cases, and their float64 gradients."""

import math

import pytest
import torch
from support.losses import LENGTHS, TRL_METRICS, run
from support.random_pairs import PAIR_METHODS, random_pair, spec_of

from otpo.methods import LOSSES, METHODS, resolve
from otpo.methods.losses import coupled, pair_loss, pairwise
from otpo.methods.weights import token_weights
from otpo.methods.weights.length import uniform

LOG_TWO = dict.fromkeys(["dpo", "sampo", "otpo", "cdpo", "robust-dpo", "dpo-norm", "ld-dpo"], math.log(2))
LOG_TWO |= dict.fromkeys(["aot", "aot-unpaired", "dpop", "f-dpo", "tgdpo", "tis-dpo", "tdpo1", "tdpo2"], math.log(2))
ONE = dict.fromkeys(["hinge", "gpo-squared", "gpo-exponential", "gpo-truncated-quadratic", "apo-zero", "apo-down"], 1.0)
GOLDEN = LOG_TWO | ONE | dict.fromkeys(["ipo", "ipo-sum", "otpo-ipo"], 25.0)
GOLDEN |= {"gpo-savage": 0.25, "sppo-hard": 50.0, "nca": math.log(4), "bco-pair": math.log(4), "exo": 2.761230}
GOLDEN |= {"discopop": 0.846574}
# not a constant: see the tests below
GOLDEN |= {"r-dpo": None, "ld-dpo-policy": None, "wpo": None}


@pytest.mark.parametrize("rule", [None, "otpo"])
@pytest.mark.parametrize("label", [label for label, value in GOLDEN.items() if value])
def test_golden_value_where_policy_equals_reference(label, rule):
    settings = {"beta": 0.1} | ({} if rule is None else {"weights": rule})
    output = run(label, random_pair(*LENGTHS, hidden=8, equal=True), **settings)
    torch.testing.assert_close(output.losses, torch.full((5,), GOLDEN[label]), atol=1e-6, rtol=1e-6)
    assert output.metrics["rewards/margins"].abs().max() < 1e-6


def test_length_regularisation_alone_is_left_where_policy_equals_reference():
    pair = random_pair(*LENGTHS, equal=True)
    longer = 0.01 * (pair.chosen.lengths - pair.rejected.lengths)
    torch.testing.assert_close(run("r-dpo", pair).losses, torch.log1p(torch.exp(-longer)))


def test_weighting_the_policy_alone_leaves_the_tails_where_policy_equals_reference():
    pair = random_pair([5, 2], [3, 2], equal=True)
    tail = 0.1 * (0.25 - 1) * pair.chosen.policy[0, 3:].sum()
    expected = torch.stack([torch.log1p(torch.exp(-tail)), torch.tensor(2.0).log()])
    torch.testing.assert_close(run("ld-dpo-policy", pair, ld_alpha=0.25).losses, expected)


def test_every_method_with_a_reference_has_a_golden_value():
    losses = {name: method.loss.name for name, method in METHODS.items()}
    against_reference = {name for name, loss in losses.items() if hasattr(pairwise, loss) or hasattr(coupled, loss)}
    assert set(GOLDEN) == against_reference
    assert all("reference" in METHODS[name].needs for name in against_reference)


def test_sampo_of_equal_lengths_is_dpo():
    pair = random_pair([4, 7, 1], [4, 7, 1])
    for expected in (True, False):
        torch.testing.assert_close(run("sampo", pair, expected=expected).losses, run("dpo", pair).losses)


@pytest.mark.parametrize(
    ("label", "settings"),
    [
        ("cdpo", {"label_smoothing": 0}),
        ("robust-dpo", {"label_smoothing": 0}),
        ("ld-dpo", {"ld_alpha": 1}),
        ("r-dpo", {"length_alpha": 0}),
        ("ld-dpo-policy", {"ld_alpha": 1}),
        ("dpop", {"dpop_lambda": 0}),
        ("tdpo2", {"tdpo_alpha": 0}),
        ("tgdpo", {"tgdpo_alpha": 0}),
        ("tis-dpo", {"transform": "binary", "keep_ratio": 1}),
        ("f-dpo", {"divergence": "reverse_kl"}),
        ("f-dpo", {"divergence": "alpha", "divergence_alpha": 1}),
    ],
)
def test_special_cases_are_dpo(label, settings):
    pair = random_pair(*LENGTHS)
    torch.testing.assert_close(run(label, pair, **settings).losses, run("dpo", pair).losses)


def test_gpo_squared_is_ipo_up_to_scale():
    pair = random_pair(*LENGTHS)
    torch.testing.assert_close(
        run("gpo-squared", pair, beta=0.2).losses, 0.2**2 * run("ipo-sum", pair, beta=0.1).losses
    )


def test_ld_without_tails_is_dpo_of_the_common_length():
    pair, cut = random_pair([9, 3], [6, 7]), random_pair([9, 3], [6, 7])
    for side in (cut.chosen, cut.rejected):
        side.mask = torch.arange(side.mask.shape[1])[None] < torch.tensor([6, 3])[:, None]
    torch.testing.assert_close(run("ld-dpo", pair, ld_alpha=0).losses, run("dpo", cut).losses)


def test_robust_loss_is_unbiased_under_flipped_labels():
    """(1 - eps) loss + eps loss of the swapped pair is the loss of clean labels."""
    pair = random_pair(*LENGTHS)
    swapped = type(pair)(pair.rejected, pair.chosen)
    noisy = 0.7 * run("robust-dpo", pair, label_smoothing=0.3).losses
    noisy += 0.3 * run("robust-dpo", swapped, label_smoothing=0.3).losses
    torch.testing.assert_close(noisy, run("dpo", pair).losses)


def test_sepo_on_all_tokens_is_simpo():
    pair = random_pair(*LENGTHS)
    torch.testing.assert_close(
        run("sepo", pair, keep_ratio=1).losses, run("simpo", pair, beta=1, gamma_beta_ratio=0).losses
    )


def test_otpo_under_means_is_their_plain_form_at_large_reg():
    pair = random_pair(*LENGTHS, hidden=8)
    for plain in ("simpo", "ipo", "dpo-norm", "alphapo", "orpo"):
        even, sharp = (run("mine", pair, method=plain, weights="otpo", reg=reg).losses for reg in (1e6, 0.03))
        torch.testing.assert_close(even, run(plain, pair).losses, rtol=1e-4, atol=1e-4)
        assert (sharp - run(plain, pair).losses).abs().max() > 1e-3


@pytest.mark.parametrize("label", [label for label in PAIR_METHODS if not METHODS[label].means])
def test_otpo_under_any_sum_is_its_length_matched_form_at_large_reg(label):
    pair = random_pair(*LENGTHS, hidden=8)
    shared = {"method": label}
    found, expected, sharp = (
        run("mine", pair, **shared, **settings).losses
        for settings in (
            {"weights": "otpo", "reg": 1e6},
            {"weights": "sampo", "expected": True},
            {"weights": "otpo", "reg": 0.01},
        )
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (sharp - expected).abs().max() > 1e-4


def test_simpo_without_margin_is_cpo_on_mean_log_probabilities():
    pair = random_pair(*LENGTHS)
    simpo = run("simpo", pair, beta=1.5, gamma_beta_ratio=0).losses
    for side in (pair.chosen, pair.rejected):
        side.policy = side.policy / side.lengths[:, None]
    torch.testing.assert_close(run("cpo", pair, beta=1.5, cpo_alpha=0).losses, simpo)


def test_otpo_at_large_reg_is_the_expectation_of_sampo():
    pair = random_pair(*LENGTHS, hidden=8)
    torch.testing.assert_close(
        run("otpo", pair, reg=1e6).losses, run("sampo", pair, expected=True).losses, atol=1e-5, rtol=0
    )


def test_otpo_loss_is_dpo_of_weighted_sums():
    pair = random_pair(*LENGTHS, hidden=8)
    spec = resolve("otpo", {})
    weights = token_weights(spec, pair)
    for side, w in ((pair.chosen, weights.chosen), (pair.rejected, weights.rejected)):
        side.policy = side.policy * w
        side.frozen["reference"] = side.frozen["reference"] * w
    expected = LOSSES["sigmoid"].function(pair, uniform(pair), beta=0.1).losses
    original = random_pair(*LENGTHS, hidden=8)
    torch.testing.assert_close(pair_loss(spec, original, weights).losses, expected)


def test_identical_completions_give_log_two_and_no_gradient():
    pair = random_pair([6, 3], [6, 3], hidden=8)
    pair.rejected.hidden, pair.rejected.frozen = pair.chosen.hidden, pair.chosen.frozen
    policy = pair.chosen.policy.clone().requires_grad_()
    for label in ("dpo", "otpo"):
        pair.chosen.policy = pair.rejected.policy = policy
        losses = run(label, pair).losses
        torch.testing.assert_close(losses, torch.full((2,), math.log(2)))
        (gradient,) = torch.autograd.grad(losses.sum(), policy)
        assert gradient.abs().max() < 1e-7


# AOT (unpaired) shares its terms' values between pairs, not their gradients: those are TRL's, see above
@pytest.mark.parametrize("label", [label for label in PAIR_METHODS if label != "aot-unpaired"])
def test_gradients_in_float64(label):
    spec = spec_of(label)
    pair = random_pair([4, 2, 1], [3, 5, 0], hidden=6, dtype=torch.float64)
    weights = token_weights(spec, pair)

    def losses(chosen, rejected):
        for side, policy in ((pair.chosen, chosen), (pair.rejected, rejected)):
            side.policy = policy
            side.vocabulary["log_sum_squares"] = policy.detach() + 0.5  # WPO's weight has no gradient: hold it
        return pair_loss(spec, pair, weights, global_values).losses

    collect = spec.method.loss.collect
    global_values = collect(pair, weights) if collect else None
    inputs = [side.policy.clone().requires_grad_() for side in (pair.chosen, pair.rejected)]
    assert torch.autograd.gradcheck(losses, inputs)


def test_gradient_of_each_token_is_proportional_to_its_weight():
    pair = random_pair([7], [4], hidden=8)
    spec = resolve("otpo", {})
    weights = token_weights(spec, pair)
    for side in (pair.chosen, pair.rejected):
        side.policy.requires_grad_()
    output = pair_loss(spec, pair, weights)
    output.losses.sum().backward()
    slope = 0.1 * torch.sigmoid(-output.metrics["rewards/margins"])
    torch.testing.assert_close(pair.chosen.policy.grad, -slope * weights.chosen)
    torch.testing.assert_close(pair.rejected.policy.grad, slope * weights.rejected)


@pytest.mark.parametrize("label", PAIR_METHODS)
def test_metrics_are_per_pair_detached_and_carry_the_weights(label):
    pair = random_pair(*LENGTHS, hidden=8)
    pair.chosen.policy.requires_grad_()
    output = run(label, pair)
    assert output.losses.shape == (5,) and output.losses.requires_grad
    assert set(TRL_METRICS) | {"logps/chosen", "weights/entropy_chosen"} <= set(output.metrics)
    assert all(values.shape == (5,) and not values.requires_grad for values in output.metrics.values())


@pytest.mark.parametrize("label", PAIR_METHODS)
def test_empty_completions_and_extreme_log_probabilities_stay_finite(label):
    pair = random_pair([3, 0, 2, 0], [0, 4, 2, 0], hidden=4)
    pair.chosen.policy[2] *= 1e4
    for side in (pair.chosen, pair.rejected):
        side.policy.requires_grad_()
    losses = run(label, pair).losses
    losses.sum().backward()
    assert torch.isfinite(losses).all()
    assert torch.isfinite(pair.chosen.policy.grad).all() and torch.isfinite(pair.rejected.policy.grad).all()


def test_every_loss_is_used():
    assert set(LOSSES) == {method.loss.name for method in METHODS.values()}
