"""Token weights: what must hold for each rule whatever the tokens say."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.random_pairs import random_pair, spec_of

from otpo.data.collate import collate_pairs
from otpo.errors import WorkError
from otpo.explain import token_weight_rows
from otpo.methods import METHODS, WEIGHT_RULES, resolve
from otpo.methods.finite import check_finite
from otpo.methods.weights import shared_prefix_gradient, token_weights
from otpo.methods.weights.length import sampo, uniform
from otpo.methods.weights.otpo import otpo
from otpo.methods.weights.transport import cost_matrix, sinkhorn_unbalanced
from otpo.records import LogProbs, PairLogProbs, TokenPair, TokenWeights

PAPER = dict(reg=0.1, reg_m=0.2)
lengths = st.lists(st.integers(0, 12), min_size=3, max_size=3)


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(METHODS)), lengths, lengths, st.integers(0, 100))
def test_every_rule_is_finite_zero_on_padding_and_blind_to_it(name, chosen, rejected, seed):
    spec = spec_of(name)
    pair = random_pair(chosen, rejected, seed=seed, hidden=8, widths=(12, 12))
    wider = random_pair(chosen, rejected, seed=seed, hidden=8, widths=(12, 12))
    for side in (wider.chosen, wider.rejected):
        side.mask = torch.nn.functional.pad(side.mask, (0, 5))
        side.policy = torch.nn.functional.pad(side.policy, (0, 5))
        side.hidden = torch.nn.functional.pad(side.hidden, (0, 0, 0, 5), value=1e3)
        side.vocabulary = {name: torch.nn.functional.pad(values, (0, 5)) for name, values in side.vocabulary.items()}
        side.frozen = {name: torch.nn.functional.pad(scores, (0, 5)) for name, scores in side.frozen.items()}
    weights, padded = token_weights(spec, pair, seed=seed), token_weights(spec, wider, seed=seed)
    for got, more, side in (
        (weights.chosen, padded.chosen, pair.chosen),
        (weights.rejected, padded.rejected, pair.rejected),
    ):
        assert torch.isfinite(got).all() and (name == "tgdpo" or (got >= 0).all())
        assert (got[~side.mask] == 0).all() and (more[:, 12:] == 0).all()
        close(got, more[:, :12])
    assert all(torch.isfinite(values).all() and values.shape == (3,) for values in weights.metrics.values())


@settings(max_examples=25, deadline=None)
@given(lengths, lengths, st.integers(0, 100), st.sampled_from([0.03, 0.1, 1.0]))
def test_otpo_sums_to_the_shorter_length(chosen, rejected, seed, reg):
    pair = random_pair(chosen, rejected, seed=seed, hidden=8)
    weights = otpo(pair, reg=reg, reg_m=0.2)
    shorter = torch.minimum(pair.chosen.lengths, pair.rejected.lengths).float()
    close(weights.chosen.sum(1), shorter, 1e-4)
    close(weights.rejected.sum(1), shorter, 1e-4)


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(9)), st.permutations(range(6)), st.permutations(range(2)))
def test_otpo_follows_permutations_of_tokens_and_pairs(order_c, order_r, order_b):
    pair = random_pair([9, 9], [6, 6], hidden=8)
    weights = otpo(pair, **PAPER)
    pair.chosen.hidden = pair.chosen.hidden[order_b][:, order_c]
    pair.rejected.hidden = pair.rejected.hidden[order_b][:, order_r]
    permuted = otpo(pair, **PAPER)
    close(permuted.chosen, weights.chosen[order_b][:, order_c])
    close(permuted.rejected, weights.rejected[order_b][:, order_r])


def test_otpo_of_swapped_sides_is_swapped():
    pair = random_pair([9, 3], [6, 7], hidden=8)
    weights, swapped = otpo(pair, **PAPER), otpo(PairLogProbs(pair.rejected, pair.chosen), **PAPER)
    close(swapped.chosen, weights.rejected)
    close(swapped.rejected, weights.chosen)


def test_otpo_of_equal_completions_is_equal_on_both_sides():
    side = random_pair([9, 4, 1], [1, 1, 1], hidden=8).chosen
    weights = otpo(PairLogProbs(side, side), **PAPER)
    close(weights.chosen, weights.rejected)
    close(weights.chosen.sum(1), torch.tensor([9.0, 4.0, 1.0]))


def test_otpo_at_large_reg_is_the_expectation_of_sampo():
    pair = random_pair([9, 3, 5], [6, 7, 5], hidden=8)
    flat, expectation = otpo(pair, reg=1e6, reg_m=0.2), sampo(pair, expected=True)
    close(flat.chosen, expectation.chosen, 1e-5)
    close(flat.rejected, expectation.rejected, 1e-5)


def test_otpo_prefers_tokens_with_a_counterpart():
    """Half of the chosen tokens reappear on the other side; the smaller reg, the larger their weights."""
    pair = random_pair([20], [10], hidden=32)
    pair.rejected.hidden = pair.chosen.hidden[:, :10].clone()
    contrast = []
    for reg in (1.0, 0.1, 0.03):
        weights = otpo(pair, reg=reg, reg_m=0.2).chosen[0]
        contrast.append((weights[:10].mean() / weights[10:].mean()).item())
    assert 1 < contrast[0] < 1.2 and contrast == sorted(contrast) and contrast[-1] > 2.5


def test_otpo_tightens_to_even_weights_as_marginals_are_enforced():
    pair = random_pair([8], [8], hidden=8)
    spreads = [otpo(pair, reg=0.1, reg_m=reg_m).chosen[0].std().item() for reg_m in (0.05, 0.2, 1.0, 10.0)]
    assert spreads == sorted(spreads, reverse=True) and spreads[-1] < 0.02


def test_otpo_survives_costs_that_underflow():
    """Distances in the hundreds, undivided: no plan above 1e-300 exists, its proportions still do."""
    pair = random_pair([5, 2], [3, 4], hidden=16)
    for side in (pair.chosen, pair.rejected):
        side.hidden = 200 * side.hidden
    for cost in ("l2", "sqeuclidean"):
        weights = otpo(pair, **PAPER, cost=cost, normalizer="none")
        close(weights.chosen.sum(1), torch.tensor([3.0, 2.0]), 1e-4)


def test_otpo_takes_half_precision_states_and_other_options():
    pair = random_pair([9, 3], [6, 7], hidden=16)
    for side in (pair.chosen, pair.rejected):
        side.hidden = side.hidden + 2  # norms above the distances between tokens, as in a language model
    single = otpo(pair, **PAPER)
    for solver in ("batched", "pot"):
        close(otpo(pair, **PAPER, solver=solver).chosen, single.chosen)
    assert not torch.allclose(otpo(pair, **PAPER, normalizer="valid").chosen, single.chosen, atol=1e-3)
    for cost in ("sqeuclidean", "cosine"):
        assert not torch.allclose(otpo(pair, **PAPER, cost=cost).chosen, single.chosen, atol=1e-3)
    for side in (pair.chosen, pair.rejected):
        side.hidden = side.hidden.bfloat16()
    close(otpo(pair, **PAPER).chosen, single.chosen, 2e-2)


def test_otpo_has_no_gradient_and_says_what_it_needs():
    pair = random_pair([3], [4], hidden=4)
    pair.chosen.hidden.requires_grad_()
    pair.chosen.policy.requires_grad_()
    assert not otpo(pair, **PAPER).chosen.requires_grad
    with pytest.raises(ValueError, match="hidden"):
        otpo(random_pair([3], [4]), **PAPER)


def test_transport_mass_of_single_tokens_in_closed_form():
    """log g = -C / (reg + 2 reg_m)."""
    pair = random_pair([1], [1], hidden=2)
    pair.chosen.hidden, pair.rejected.hidden = torch.zeros(1, 1, 2), torch.tensor([[[0.3, 0.0]]])
    mass = otpo(pair, **PAPER).metrics["weights/transport_mass"].item()
    assert mass == pytest.approx(math.exp(-(0.3 + 1e-6) / 0.5), rel=1e-6)


def test_uniform_counts_tokens():
    pair = random_pair([4, 0], [2, 3])
    weights = uniform(pair)
    assert weights.chosen.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert weights.rejected.tolist() == [[1, 1, 0], [1, 1, 1]]


def test_mean_and_length_desensitised_weights_by_hand():
    pair = random_pair([4, 0], [2, 3])
    mean = token_weights(resolve("simpo", {}), pair)
    assert mean.chosen.tolist() == [[0.25] * 4, [0] * 4] and mean.rejected[0].tolist() == [0.5, 0.5, 0]
    tails = token_weights(resolve("ld-dpo", {"ld_alpha": 0.25}), pair)
    assert tails.chosen.tolist() == [[1, 1, 0.25, 0.25], [0] * 4]
    assert tails.rejected.tolist() == [[1, 1, 0], [0.25] * 3]


def test_sampo_keeps_as_many_tokens_as_the_shorter_completion_has():
    pair = random_pair([9, 3, 5, 0], [6, 7, 5, 4])
    weights = sampo(pair, seed=1, expected=False)
    assert set(weights.chosen.unique().tolist()) <= {0.0, 1.0}
    assert weights.chosen.sum(1).tolist() == [6, 3, 5, 0] == weights.rejected.sum(1).tolist()
    assert weights.rejected[0].tolist() == [1] * 6 + [0]  # the shorter completion is kept whole


def test_sampo_draws_by_row_and_seed_alone():
    pair = random_pair([40, 40, 40], [10, 10, 10])
    weights = sampo(pair, seed=5, expected=False).chosen
    order = [2, 0]
    part = random_pair([40, 40], [10, 10], widths=(64, 10))
    part.chosen.rows = part.rejected.rows = torch.tensor(order)
    close(sampo(part, seed=5, expected=False).chosen[:, :40], weights[order])
    assert (weights[0] != weights[1]).any()
    assert (sampo(pair, seed=6, expected=False).chosen != weights).any()
    swapped = sampo(PairLogProbs(pair.rejected, pair.chosen), seed=5, expected=False).rejected
    assert (swapped != weights).any()  # the sides draw independently


def test_sampo_averages_to_its_expectation():
    """Over 4,000 rows; the standard error of a frequency is at most sqrt(.25 / 4000) = .008."""
    pair = random_pair([12] * 4000, [4] * 4000)
    expectation = sampo(pair, expected=True)
    assert expectation.chosen[0, 0].item() == pytest.approx(4 / 12) and expectation.rejected[0, 0].item() == 1
    for seed in (0, 1):
        draws = sampo(pair, seed=seed, expected=False)
        close(draws.chosen.mean(0), expectation.chosen[0], 0.04)
        together = (draws.chosen[:, 0] * draws.chosen[:, 1]).mean().item()
        assert together == pytest.approx(4 / 12 * 3 / 11, abs=0.03)  # without replacement
    one = random_pair([12], [4])
    several = torch.stack([sampo(one, seed=seed, expected=False).chosen[0] for seed in range(200)]).mean(0)
    close(several, expectation.chosen[0], 0.17)  # 5 standard errors over seeds


def test_weight_metrics_by_hand():
    pair = random_pair([12, 1], [4, 3])
    metrics = token_weights(resolve("sampo", {}), pair).metrics
    close(metrics["weights/effective_tokens_chosen"], torch.tensor([4.0, 1.0]))
    close(metrics["weights/entropy_chosen"], torch.tensor([math.log(4) / math.log(12), 1.0]))
    close(metrics["weights/entropy_rejected"], torch.tensor([1.0, 0.0]))
    assert metrics["weights/min"].tolist() == [0, 0] and metrics["weights/max"].tolist() == [1, 1]


def test_weights_that_sum_to_one_are_means():
    pair = random_pair([9, 3, 0], [6, 7, 2], hidden=8)
    weights, one = otpo(pair, **PAPER), otpo(pair, **PAPER, total="one")
    for side, scaled in ((weights.chosen, one.chosen), (weights.rejected, one.rejected)):
        close(scaled.sum(1), torch.tensor([1.0, 1.0, 0.0]))
        close(scaled[:2] * torch.tensor([[6.0], [3.0]]), side[:2])


def test_iterations_of_the_solver_follow_the_tolerance_or_are_given():
    pair = random_pair([9, 3], [6, 7], hidden=8)
    exact = otpo(pair, reg=0.03, reg_m=0.2, tolerance=1e-12).chosen
    errors = [(otpo(pair, reg=0.03, reg_m=0.2, iterations=n).chosen - exact).abs().max().item() for n in (1, 5, 100)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-3 and errors[-1] < 1e-6
    assert (otpo(pair, reg=0.03, reg_m=0.2, tolerance=0.1).chosen - exact).abs().max() > errors[-1]


def test_the_mass_of_a_side_scales_the_plan_and_not_the_weights():
    """Masses 1 / length give the weights of masses 1: why there is no option for it."""
    pair = random_pair([9, 4], [3, 6], hidden=8)
    masks = (pair.chosen.mask, pair.rejected.mask)
    costs = cost_matrix(pair.chosen.hidden, pair.rejected.hidden, *masks)
    masses = [mask / mask.sum(-1, keepdim=True) for mask in masks]
    plan = sinkhorn_unbalanced(costs, *masses, **PAPER).exp()
    rescaled = plan.sum(2) / plan.sum((1, 2))[:, None] * torch.tensor([[3.0], [4.0]])
    close(rescaled.float(), otpo(pair, **PAPER).chosen)


def test_confpo_selects_the_tokens_below_the_mean_probability():
    pair = random_pair([4, 1], [2, 3])
    pair.chosen.policy = torch.tensor([[0.9, 0.2, 0.1, 0.5], [0.3, 1, 1, 1]]).log()
    weights = token_weights(resolve("confpo", {}), pair)
    assert weights.chosen.tolist() == [[0, 0.5, 0.5, 0], [0, 0, 0, 0]]
    close(weights.rejected.sum(1), torch.ones(2))


def scored(chosen, rejected, high, low):
    """A pair whose scores log pi_high - log pi_low are given."""
    pair = random_pair([len(chosen)], [len(rejected)])
    for side, scores in ((pair.chosen, chosen), (pair.rejected, rejected)):
        side.frozen = {low: torch.full((1, len(scores)), -1.0), high: torch.tensor([scores]) - 1}
    return pair


def test_sepo_keeps_the_best_of_the_chosen_and_the_worst_of_the_rejected_completion():
    pair = scored([0.5, -1.0, 0.75, 0.0], [0.5, -1.0, 0.75], "oracle", "reference")
    weights = token_weights(spec_of("sepo", keep_ratio=0.5), pair)
    assert weights.chosen.tolist() == [[0.5, 0, 0.5, 0]]
    assert weights.rejected.tolist() == [[0, 1, 0]]
    one = token_weights(spec_of("sepo", keep_ratio=0.01), pair)
    assert one.chosen.tolist() == [[0, 0, 1, 0]]
    ten = scored([float(i) for i in range(10)], [0.0], "oracle", "reference")
    assert (token_weights(spec_of("sepo"), ten).chosen > 0).sum() == 3


def test_tis_transforms_by_hand():
    pair = scored([0.0, -4.0, 1.0], [0.0, -4.0, 1.0], "positive", "negative")
    ranked = token_weights(spec_of("tis-dpo"), pair)
    close(ranked.chosen, torch.tensor([[1.0, 0.7, 1.3]]))
    close(ranked.rejected, torch.tensor([[1.0, 1.3, 0.7]]))
    scaled = token_weights(spec_of("tis-dpo", transform="threshold_and_scale"), pair)
    close(scaled.chosen, torch.tensor([[1.0, 0.7, 1.2]]))
    close(scaled.rejected, torch.tensor([[1.0, 1.3, 0.8]]))
    binary = token_weights(spec_of("tis-dpo", transform="binary", keep_ratio=0.4), pair)
    assert binary.chosen.tolist() == [[0, 0, 1]] and binary.rejected.tolist() == [[0, 1, 0]]
    single = token_weights(spec_of("tis-dpo"), scored([2.0], [1.0], "positive", "negative"))
    assert single.chosen.item() == 1 == single.rejected.item()


def test_tgdpo_weights_are_one_plus_and_one_minus_the_tokens_rewards():
    pair = scored([2.0, -3.0], [2.0], "oracle", "reference")
    weights = token_weights(spec_of("tgdpo", beta=0.5, tgdpo_alpha=0.5), pair)
    close(weights.chosen, torch.tensor([[1.5, 0.25]]))
    close(weights.rejected, torch.tensor([[0.5]]))


def sequence_batch(chosen, rejected):
    return collate_pairs([TokenPair(i, [1], c, r) for i, (c, r) in enumerate(zip(chosen, rejected, strict=True))])


def test_shared_prefix_gradient_is_what_the_prefix_keeps_in_the_margin():
    batch = sequence_batch([[5, 6, 7, 8], [1, 2], [0, 0]], [[5, 6, 9, 8], [3, 2], [0, 0, 4]])
    chosen = torch.tensor([[0.5, 0.75, 9, 9], [9, 9, 0, 0], [1, 1, 0, 0]])
    rejected = torch.tensor([[1.0, 0.5, 4, 4], [4, 4, 0, 0], [1, 1, 1, 0]])
    assert shared_prefix_gradient(TokenWeights(chosen, rejected), batch).tolist() == [0.75, 0, 0]
    narrow = TokenWeights(chosen, rejected[:, :3])  # the sides may be padded to their own widths
    assert shared_prefix_gradient(narrow, batch).tolist() == [0.75, 0, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_numbers_name_the_row_and_the_side(value):
    pair = random_pair([4, 3], [2, 5], hidden=4, first_row=40)
    check_finite(pair)
    pair.rejected.hidden[0, 3] = value  # padding
    check_finite(pair)
    pair.rejected.hidden[1, 3, 2] = value
    with pytest.raises(WorkError, match="data row 41: hidden states, rejected completion"):
        check_finite(pair)
    pair = random_pair([4, 3], [2, 5], first_row=40)
    pair.chosen.frozen["reference"][0, 0] = value
    pair.chosen.policy[1, 0] = value
    with pytest.raises(WorkError, match=r"41.*policy.*40.*'reference'"):
        check_finite(pair)


def test_explanation_holds_each_completion_token_and_the_plan():
    pair = random_pair([3, 2], [2, 4], hidden=8, first_row=7)
    tokens = [TokenPair(7, [1, 2], [3, 4, 5], [6, 7]), TokenPair(8, [1], [3, 4], [6, 7, 8, 9])]
    rows = token_weight_rows(resolve("otpo", {}), tokens, pair, plan=True)
    assert [row["row"] for row in rows] == [7, 8] and rows[0]["chosen_ids"] == [3, 4, 5]
    assert [len(row["rejected_weights"]) for row in rows] == [2, 4]
    for row in rows:
        plan = torch.tensor(row["plan"]) / row["metrics"]["weights/transport_mass"]
        close(plan.sum(1), torch.tensor(row["chosen_weights"]), 1e-5)
        close(plan.sum(0), torch.tensor(row["rejected_weights"]), 1e-5)
    assert "plan" not in token_weight_rows(resolve("dpo", {}), tokens, pair, plan=True)[0]
    with pytest.raises(ValueError, match="data row 7"):
        token_weight_rows(resolve("dpo", {}), [tokens[0], tokens[0]][::-1], random_pair([2, 2], [2, 2]))


def test_a_missing_frozen_model_is_named():
    side = random_pair([2], [2]).chosen
    with pytest.raises(KeyError, match="oracle"):
        LogProbs(side.policy, side.mask, side.rows).frozen_logps("oracle")


def test_every_rule_is_used():
    assert set(WEIGHT_RULES) == {method.weight_rule.name for method in METHODS.values()}
