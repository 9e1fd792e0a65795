"""KTO: the loss against TRL and closed forms, the mismatched completions, and steps that batching does not change."""

import math
from collections import defaultdict
from types import MethodType, SimpleNamespace

import pytest
import torch
from support.random_pairs import random_side, spec_of

from otpo.methods.losses import completion_loss
from otpo.methods.losses.unpaired import kto_values

LENGTHS = [9, 3, 5, 12, 1, 7]
LABELS = torch.tensor([True, False, False, True, False, False])


def run(completions, labels, others, **settings):
    return completion_loss(spec_of("kto", **settings), completions, labels, kto_values(others, labels))


# ---- the loss ----


def trl_loss(completions, labels, others, *, beta, desirable_weight, undesirable_weight):
    """Loss and metrics of TRL's KTOTrainer on the same per-token log-probabilities."""
    from trl.trainer.kto_trainer import KTOTrainer

    def outputs(side):
        zeros = torch.zeros_like(side.policy)
        return SimpleNamespace(log_probs=side.policy, entropy=zeros, mean_logits=zeros)

    def ids(side, first):
        return torch.nn.functional.pad(side.mask.long(), (1, 0), value=first)

    policy = torch.nn.Identity()
    policy.forward = lambda input_ids, **_: outputs(others if input_ids[0, 0] == 1 else completions)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        model=policy,
        calculate_KL=True,
        loss_type="kto",
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    trainer._compute_kl_logps = MethodType(KTOTrainer._compute_kl_logps, trainer)
    inputs = {
        "input_ids": ids(completions, 0),
        "attention_mask": ids(completions, 1),
        "completion_mask": ids(completions, 0),
        "KL_input_ids": ids(others, 1),
        "KL_attention_mask": ids(others, 1),
        "KL_completion_mask": ids(others, 0),
        "label": labels,
        "ref_logps": completions.frozen_logps("reference").sum(-1),
        "ref_KL_logps": others.frozen_logps("reference").sum(-1),
    }
    loss = KTOTrainer._compute_loss(trainer, policy, inputs, False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items() if isinstance(values, list)}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.5, 0.4)])
def test_loss_metrics_and_gradient_are_those_of_trl(seed, weights):
    settings = {"beta": 0.3, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    completions, others = random_side(LENGTHS, seed=seed), random_side(LENGTHS[::-1], seed=seed + 50)
    completions.policy.requires_grad_()
    output = run(completions, LABELS, others, **settings)
    (ours,) = torch.autograd.grad(output.losses.mean(), completions.policy)
    loss, metrics = trl_loss(completions, LABELS, others, **settings)
    (theirs,) = torch.autograd.grad(loss, completions.policy)
    assert output.losses.mean().item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(ours * completions.mask, theirs * completions.mask, rtol=1e-5, atol=1e-9)
    named = {"kl", *(f"{name}/{side}" for name in ("rewards", "logps") for side in ("chosen", "rejected"))}
    for name in named | {"rewards/margins"}:
        assert output.metrics[name].mean().item() == pytest.approx(metrics[name], rel=1e-5, abs=1e-6)


def test_the_kl_term_of_trl_is_met_on_either_side_of_zero():
    """Else the comparison above would not see a missing clamp."""
    found = [kto_values(random_side(LENGTHS[::-1], seed=seed + 50), LABELS)[:, 0].mean().item() for seed in range(6)]
    assert min(found) < 0 < max(found)


def by_hand(ratio, other_ratio):
    """One completion with log-ratio `ratio`, and a mismatched one."""
    completions, others = random_side([2]), random_side([2])
    completions.policy, completions.frozen["reference"] = (
        torch.tensor([[-1.0, ratio - 1]]),
        torch.tensor([[-1.0, -1.0]]),
    )
    others.policy, others.frozen["reference"] = torch.tensor([[other_ratio, -1.0]]), torch.tensor([[0.0, -1.0]])
    return completions, others


@pytest.mark.parametrize(
    ("ratio", "other", "label", "expected"),
    [
        (2.0, 0.5, True, 1 / (1 + math.exp(0.5 * 1.5))),
        (2.0, -3.0, True, 1 / (1 + math.exp(0.5 * 2.0))),  # z is at least 0
        (2.0, 0.5, False, 3 / (1 + math.exp(-0.5 * 1.5))),
        (-1.0, 0.5, False, 3 / (1 + math.exp(0.5 * 1.5))),
        (-900.0, 0.0, True, 1.0),
        (-900.0, 0.0, False, 0.0),
    ],
)
def test_closed_form(ratio, other, label, expected):
    completions, others = by_hand(ratio, other)
    output = run(completions, torch.tensor([label]), others, beta=0.5, undesirable_weight=3)
    assert output.losses.item() == pytest.approx(expected, rel=1e-6)
    assert output.metrics["kl"].item() == max(other, 0)
    side, missing = ("chosen", "rejected") if label else ("rejected", "chosen")
    assert output.metrics[f"rewards/{side}"].item() == pytest.approx(0.5 * ratio)
    assert not {f"rewards/{missing}", f"logps/{missing}", "rewards/margins"} & set(output.metrics)


def test_golden_value_where_policy_equals_reference():
    completions, others = random_side(LENGTHS, equal=True), random_side(LENGTHS[::-1], seed=1, equal=True)
    torch.testing.assert_close(run(completions, LABELS, others).losses, torch.full((6,), 0.5))
    weighted = run(completions, LABELS, others, desirable_weight=2, undesirable_weight=0.5).losses
    torch.testing.assert_close(weighted, torch.where(LABELS, 1.0, 0.25))


def test_gradients_in_float64_do_not_pass_through_the_kl_term():
    completions = random_side([4, 2, 1], dtype=torch.float64)
    others = random_side([3, 5, 2], seed=1, dtype=torch.float64)
    labels = torch.tensor([True, False, True])
    others.policy = others.frozen_logps("reference") + 0.1 * others.mask  # z above 0
    others.policy.requires_grad_()
    global_values = kto_values(others, labels)
    assert global_values[:, 0].mean() > 0 and not global_values.requires_grad
    spec = spec_of("kto", sft_weight=0.3)

    def losses(policy):
        completions.policy = policy
        return completion_loss(spec, completions, labels, global_values).losses

    assert torch.autograd.gradcheck(losses, completions.policy.clone().requires_grad_())


def test_sft_weight_adds_the_likelihood_of_desirable_completions():
    completions, others = random_side(LENGTHS), random_side(LENGTHS, seed=1)
    plain, added = (run(completions, LABELS, others, sft_weight=w) for w in (0.0, 0.7))
    likelihood = -(completions.policy.sum(-1) / torch.tensor(LENGTHS))
    torch.testing.assert_close(added.losses - plain.losses, torch.where(LABELS, 0.7 * likelihood, 0.0))
    assert added.metrics["nll_loss"].mean().item() == pytest.approx(likelihood[LABELS].mean().item())
