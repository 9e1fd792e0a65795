"""Losses against TRL, closed forms, golden values at policy == reference and float64 gradients."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from support.random_pairs import PAIR_METHODS, random_pair, spec_of

from otpo.methods import LOSSES, METHODS, resolve
from otpo.methods.losses import coupled, pair_loss, pairwise
from otpo.methods.weights import token_weights
from otpo.methods.weights.length import uniform
from otpo.records import LogProbs

LENGTHS = ([9, 3, 5, 12, 1], [6, 7, 5, 1, 12])
TRL_METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def run(label, pair, seed=0, **settings):
    spec = spec_of(label, **settings)
    return pair_loss(spec, pair, token_weights(spec, pair, seed=seed))


def trl_loss(
    pair,
    loss_type,
    *,
    beta,
    label_smoothing=0.0,
    ld_alpha=None,
    f_divergence=("reverse_kl", 0.5),
    sft=0.0,
    weighting=False,
):
    """Mean loss and metrics of TRL's DPOTrainer on the same per-token log-probabilities (its model's output)."""
    from trl.trainer.dpo_trainer import DPOTrainer

    def joined(get, fill=0.0):
        width = max(pair.chosen.mask.shape[1], pair.rejected.mask.shape[1])
        return torch.cat(
            [
                torch.nn.functional.pad(get(s), (0, width - get(s).shape[1]), value=fill)
                for s in (pair.chosen, pair.rejected)
            ]
        )

    mask = joined(lambda side: side.mask.long(), 0)
    outputs = SimpleNamespace(
        log_probs=joined(lambda side: side.policy),
        log_sum_sq_probs=joined(lambda side: side.vocabulary["log_sum_squares"]),
        entropy=mask.float(),
        mean_logits=mask.float(),
        is_top1=mask.bool(),
    )
    policy = torch.nn.Identity()
    policy.is_gradient_checkpointing = False
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        ld_alpha=ld_alpha,
        precompute_ref_logps=False,
        model=policy,
        ref_model=lambda **_: SimpleNamespace(log_probs=joined(lambda side: side.frozen_logps("reference"))),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        f_divergence_type=f_divergence[0],
        f_alpha_divergence_coef=f_divergence[1],
        loss_types=[loss_type, *["sft"] * bool(sft)],
        loss_weights=[1.0, *[sft] * bool(sft)],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=weighting,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    # One prompt token in front, which no completion mask counts.
    inputs = {
        "input_ids": torch.nn.functional.pad(mask, (1, 0)),
        "attention_mask": torch.nn.functional.pad(mask, (1, 0), value=1),
        "completion_mask": torch.nn.functional.pad(mask, (1, 0)),
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items() if isinstance(values, list)}


@pytest.mark.parametrize(
    ("label", "settings", "trl"),
    [
        ("dpo", {"beta": 0.1}, dict(loss_type="sigmoid", beta=0.1)),
        ("dpo", {"beta": 2.5}, dict(loss_type="sigmoid", beta=2.5)),
        ("robust-dpo", {"label_smoothing": 0.2}, dict(loss_type="robust", beta=0.1, label_smoothing=0.2)),
        ("hinge", {"beta": 0.4}, dict(loss_type="hinge", beta=0.4)),
        ("ipo", {"beta": 0.3}, dict(loss_type="ipo", beta=0.3)),
        ("dpo-norm", {}, dict(loss_type="sigmoid_norm", beta=5.0)),
        ("ld-dpo", {"ld_alpha": 0.3}, dict(loss_type="sigmoid", beta=0.1, ld_alpha=0.3)),
        ("wpo", {"beta": 0.3}, dict(loss_type="sigmoid", beta=0.3, weighting=True)),
        ("aot", {"label_smoothing": 0.1}, dict(loss_type="aot", beta=0.1, label_smoothing=0.1)),
        ("aot-unpaired", {"label_smoothing": 0.1}, dict(loss_type="aot_unpaired", beta=0.1, label_smoothing=0.1)),
        ("exo", {"beta": 0.3, "exo_epsilon": 0.02}, dict(loss_type="exo_pair", beta=0.3, label_smoothing=0.02)),
        ("nca", {"beta": 0.3}, dict(loss_type="nca_pair", beta=0.3)),
        ("bco-pair", {"beta": 0.3}, dict(loss_type="bco_pair", beta=0.3)),
        ("sppo-hard", {"beta": 0.3}, dict(loss_type="sppo_hard", beta=0.3)),
        ("apo-zero", {"beta": 0.3}, dict(loss_type="apo_zero", beta=0.3)),
        ("apo-down", {"beta": 0.3}, dict(loss_type="apo_down", beta=0.3)),
        ("discopop", {"beta": 0.3}, dict(loss_type="discopop", beta=0.3)),
        ("f-dpo", {"divergence": "reverse_kl"}, dict(loss_type="sigmoid", beta=0.1)),
        ("f-dpo", {}, dict(loss_type="sigmoid", beta=0.1, f_divergence=("js_divergence", 0))),
        (
            "f-dpo",
            {"divergence": "forward_kl", "beta": 1e-4},
            dict(loss_type="sigmoid", beta=1e-4, f_divergence=("forward_kl", 0)),
        ),
        *(
            (
                "f-dpo",
                {"divergence": "alpha", "divergence_alpha": alpha, "beta": 1e-4},
                dict(loss_type="sigmoid", beta=1e-4, f_divergence=("alpha_divergence", alpha)),
            )
            for alpha in (0.3, 1.0, 1.7)
        ),
    ],
)
def test_losses_and_metrics_are_those_of_trl(label, settings, trl):
    pair = random_pair(*LENGTHS)
    output = run(label, pair, **settings)
    loss, metrics = trl_loss(pair, **trl)
    assert output.losses.mean().item() == pytest.approx(loss.item(), rel=1e-5)
    # Where a loss takes means, TRL's rewards are still sums; where it cuts tails, TRL's `logps` are cut too.
    names = () if METHODS[label].weight_rule.name == "mean" else TRL_METRICS
    names += () if METHODS[label].weight_rule.name == "ld" else ("logps/chosen", "logps/rejected")
    for name in names:
        assert output.metrics[name].mean().item() == pytest.approx(metrics[name], rel=1e-5, abs=1e-6)


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


def test_gpo_squared_is_ipo_up_to_scale():
    pair = random_pair(*LENGTHS)
    torch.testing.assert_close(
        run("gpo-squared", pair, beta=0.2).losses, 0.2**2 * run("ipo-sum", pair, beta=0.1).losses
    )


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


@pytest.mark.parametrize("label", ["aot", "aot-unpaired"])
def test_sorting_the_global_batch_part_by_part_is_sorting_it_whole(label):
    """Values and gradients of TRL's loss on all pairs, from micro-batches that know the others' values."""

    def leaves():
        pair = random_pair([6] * 5, [6, 7, 5, 6, 6])
        return pair, [side.policy.requires_grad_() for side in (pair.chosen, pair.rejected)]

    whole, policies = leaves()
    loss, _ = trl_loss(whole, label.replace("-", "_"), beta=0.1)
    expected = torch.autograd.grad(5 * loss, policies)

    pair, policies = leaves()
    spec = spec_of(label)
    global_values = spec.method.loss.collect(pair, token_weights(spec, pair)).detach()
    total = torch.tensor(0.0)
    for rows in ([3, 0], [1], [4, 2]):
        part = type(pair)(
            *(
                LogProbs(
                    side.policy[rows],
                    side.mask[rows],
                    side.rows[rows],
                    {"reference": side.frozen_logps("reference")[rows]},
                )
                for side in (pair.chosen, pair.rejected)
            )
        )
        total = total + pair_loss(spec, part, token_weights(spec, part), global_values).losses.sum()
    assert total.item() == pytest.approx(5 * loss.item(), rel=1e-5)
    found = torch.autograd.grad(total, policies)
    for side, ours, theirs in zip((pair.chosen, pair.rejected), found, expected, strict=True):
        torch.testing.assert_close(ours, theirs * side.mask)  # TRL's sums run over padding, which is 0
    assert total.item() != pytest.approx(run("dpo", whole).losses.sum().item()), "ranks cross"


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


def test_likelihood_may_be_added_to_any_loss_and_is_that_of_trl():
    pair = random_pair([4, 4], [3, 5])  # TRL's mean runs over the batch's tokens: ours where lengths agree
    for label in ("dpo", "otpo", "simpo"):
        pair = random_pair([4, 4], [3, 5], hidden=6)
        output, plain = run(label, pair, sft_weight=0.7), run(label, pair)
        nll = torch.stack([-pair.chosen.policy[0].mean(), -pair.chosen.policy[1].mean()])
        torch.testing.assert_close(output.losses - plain.losses, 0.7 * nll)
        torch.testing.assert_close(output.metrics["nll_loss"], nll)
        assert "nll_loss" not in plain.metrics
    loss, _ = trl_loss(pair, "sigmoid", beta=0.1, sft=0.7)
    assert run("dpo", pair, sft_weight=0.7).losses.mean().item() == pytest.approx(loss.item(), rel=1e-5)


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


def test_summed_ipo_by_hand():
    pair = random_pair(*LENGTHS)
    margins = run("ipo-sum", pair, beta=0.2).metrics["rewards/margins"] / 0.2
    torch.testing.assert_close(run("ipo-sum", pair, beta=0.2).losses, (margins - 2.5) ** 2)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_reference_free_losses_are_those_of_trl(smoothing):
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    pair = random_pair(*LENGTHS)
    accelerator = SimpleNamespace(device="cpu")
    sums = [side.policy.sum(1) for side in (pair.chosen, pair.rejected)]
    means = [s / side.lengths for s, side in zip(sums, (pair.chosen, pair.rejected), strict=True)]
    for label, values, settings, trl in (
        ("simpo", means, {"beta": 2.5, "gamma_beta_ratio": 0.6}, dict(loss_type="simpo", beta=2.5, simpo_gamma=1.5)),
        ("cpo", sums, {"beta": 0.1, "cpo_alpha": 0}, dict(loss_type="sigmoid", beta=0.1)),
        *(
            (
                "alphapo",
                means,
                {"beta": 2.5, "gamma_beta_ratio": 0.6, "alphapo_alpha": alpha},
                dict(loss_type="simpo", beta=2.5, simpo_gamma=1.5, alpha=alpha),
            )
            for alpha in (-0.5, 0.0, 0.25, 1.0)
        ),
    ):
        trainer = SimpleNamespace(**{"accelerator": accelerator, "alpha": 0.0, "label_smoothing": smoothing, **trl})
        losses, chosen, rejected = CPOTrainer.cpo_loss(trainer, *values)
        output = run(label, pair, label_smoothing=smoothing, **settings)
        torch.testing.assert_close(output.losses, losses)
        torch.testing.assert_close(output.metrics["rewards/chosen"], chosen)
        torch.testing.assert_close(output.metrics["rewards/rejected"], rejected)


def test_orpo_is_that_of_trl_and_of_the_papers_odds():
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    pair = random_pair(*LENGTHS)
    means = [side.policy.sum(1) / side.lengths for side in (pair.chosen, pair.rejected)]
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=0.3)
    ratio, chosen, rejected, _, _ = ORPOTrainer.odds_ratio_loss(trainer, *means)
    output = run("orpo", pair, orpo_lambda=0.3)
    torch.testing.assert_close(output.losses, -means[0] - ratio)
    torch.testing.assert_close(output.metrics["rewards/chosen"], chosen)
    torch.testing.assert_close(output.metrics["rewards/rejected"], rejected)
    p, q = (mean.exp() for mean in means)
    odds_ratio = (p / (1 - p)) / (q / (1 - q))
    torch.testing.assert_close(output.losses, -means[0] + 0.3 * torch.log1p(1 / odds_ratio))


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


def test_cpo_adds_the_likelihood_of_the_chosen_completion():
    pair = random_pair([4, 2], [3, 5])
    difference = run("cpo", pair, cpo_alpha=0.5).losses - run("cpo", pair, cpo_alpha=0).losses
    torch.testing.assert_close(
        difference, -0.5 * torch.stack([pair.chosen.policy[0].mean(), pair.chosen.policy[1, :2].mean()])
    )


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
