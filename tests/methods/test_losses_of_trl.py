"""Losses and their metrics against TRL's trainers on the same log-probabilities."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from support.losses import LENGTHS, TRL_METRICS, run
from support.random_pairs import random_pair, spec_of

from otpo.methods import METHODS
from otpo.methods.losses import pair_loss
from otpo.methods.weights import token_weights
from otpo.records import LogProbs


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
