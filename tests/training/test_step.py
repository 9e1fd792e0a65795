"""One optimisation step: batching over ranks, learning rates, accumulation, losses at step 0."""

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from support.random_pairs import PAIR_METHODS, spec_of
from support.small_lm import PAIRS, small_lm
from transformers import (
    Trainer,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from otpo.data.collate import collate_completions, collate_pairs
from otpo.data.micro_batches import micro_batches, waiting
from otpo.errors import WorkError
from otpo.methods import FROZEN_MODELS, resolve
from otpo.models.policy import PolicyModel
from otpo.records import LossOutput, TokenCompletion
from otpo.training.objectives.pair import preference_losses
from otpo.training.objectives.supervised import supervised_losses
from otpo.training.optimizer import adamw
from otpo.training.schedule import learning_rate
from otpo.training.step import evaluate, optimisation_step


@given(
    tokens=st.lists(st.integers(1, 500), min_size=1, max_size=60),
    size=st.integers(1, 12),
    budget=st.none() | st.integers(1, 2000),
    world=st.integers(1, 9),
)
def test_each_item_is_computed_once_and_every_rank_has_as_many_micro_batches(tokens, size, budget, world):
    ranks = [micro_batches(tokens, size=size, budget=budget, rank=rank, world=world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(i for batches in ranks for batch in batches for i in batch) == list(range(len(tokens)))
    assert max(len(batch) for batches in ranks for batch in batches) <= size
    if budget is not None:
        assert all(sum(tokens[i] for i in b) <= budget for batches in ranks for b in batches if len(b) > 1)
    used = sum(bool(batch) for batches in ranks for batch in batches)
    assert len(ranks[0]) == math.ceil(used / world), "no more steps than needed"


@given(
    tokens=st.lists(st.integers(1, 500), min_size=1, max_size=60), budget=st.integers(1, 2000), world=st.integers(1, 9)
)
def test_balanced_micro_batches_hold_each_item_once_within_the_budget(tokens, budget, world):
    ranks = [micro_batches(tokens, size=None, budget=budget, rank=rank, world=world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(i for batches in ranks for batch in batches for i in batch) == list(range(len(tokens)))
    assert all(sum(tokens[i] for i in b) <= budget for batches in ranks for b in batches if len(b) > 1)


def test_balanced_micro_batches_are_few_and_ranks_finish_together():
    """Lengths like UltraFeedback's: a cap of 4 items would leave 16,384 tokens a micro-batch mostly empty."""
    generator = random.Random(0)
    tokens = [min(4096, int(generator.lognormvariate(6.6, 0.5))) for _ in range(256)]
    found = [micro_batches(tokens, size=None, budget=16384, rank=rank, world=8) for rank in range(8)]
    capped = [micro_batches(tokens, size=4, budget=16384, rank=rank, world=8) for rank in range(8)]
    assert len(found[0]) == math.ceil(sum(tokens) / 16384 / 8) < len(capped[0])
    assert waiting(tokens, found) < 0.02 < waiting(tokens, capped)


def test_waiting_by_hand():
    assert waiting([3, 1, 2, 2], [[[0], [2]], [[1], [3]]]) == pytest.approx(1 - 8 / 10)


def test_items_of_like_length_share_a_micro_batch():
    lengths = [1, 100, 2, 99, 3, 98, 4, 97]
    assert micro_batches(lengths, size=4, rank=0, world=1) == [[1, 3, 5, 7], [6, 4, 2, 0]]


def test_a_micro_batch_is_filled_up_to_its_budget():
    assert micro_batches([30, 10, 90, 20, 40], size=9, budget=70, rank=0, world=1) == [[2], [4, 0], [3, 1]]


def test_a_small_batch_is_spread_over_the_ranks():
    assert [micro_batches([5, 5, 5, 5], size=8, rank=r, world=2) for r in (0, 1)] == [[[0, 1]], [[2, 3]]]
    assert [micro_batches([5], size=8, rank=r, world=3) for r in (0, 1, 2)] == [[[0]], [[]], [[]]]


def test_norms_and_biases_do_not_decay_as_with_transformers():
    lm = small_lm(attention_bias=True)
    optimizer = adamw(lm, lr=1e-3, weight_decay=0.1)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    theirs = set(Trainer.get_decay_parameter_names(None, lm))
    assert 0 < len(theirs) < len(decays)
    assert {name: decays[id(p)] for name, p in lm.named_parameters()} == {
        name: 0.1 if name in theirs else 0.0 for name, _ in lm.named_parameters()
    }


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant"])
@given(total=st.integers(1, 60), ratio=st.floats(0, 1))
@examples(max_examples=30)
def test_learning_rate_equals_transformers(scheduler, total, ratio):
    make = {
        "cosine": get_cosine_schedule_with_warmup,
        "linear": get_linear_schedule_with_warmup,
        "constant": get_constant_schedule_with_warmup,
    }[scheduler]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    steps = {} if scheduler == "constant" else {"num_training_steps": total}
    theirs = make(optimizer, num_warmup_steps=math.ceil(total * ratio), **steps)
    for step in range(total):
        ours = learning_rate(step, total, 3e-4, scheduler=scheduler, warmup_ratio=ratio)
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18), f"step {step}"
        optimizer.step()
        theirs.step()


def reference(model):
    """The frozen start: what the model says now."""
    with torch.no_grad():
        logps, _ = model(collate_pairs(PAIRS))
    rows = {pair.row: (logps[i], logps[i + len(PAIRS)]) for i, pair in enumerate(PAIRS)}

    def frozen(batch):
        half, width = len(batch.rows) // 2, batch.mask.shape[1]
        values = torch.zeros(batch.mask.shape)
        for index, row in enumerate(batch.rows[:half].tolist()):
            if row >= 0:
                values[index] = rows[row][0][:width]
                values[index + half] = rows[row][1][:width]
        return dict.fromkeys(("reference", *FROZEN_MODELS), values)

    return frozen


def batches_of(*groups):
    return [collate_pairs([PAIRS[i] for i in group]) for group in groups]


def step(method, groups, *, steps=3, lr=0.05, max_grad_norm=1.0):
    """(figures of each step, the model's parameters after the last)."""
    model = PolicyModel(small_lm())
    frozen = PolicyModel(small_lm())
    losses = preference_losses(model, spec_of(method), reference(model), seed=0, reference=frozen)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    lines = [
        optimisation_step(
            model, optimizer, batches_of(*groups), losses, denominator=3, max_grad_norm=max_grad_norm, lr=lr
        )
        for _ in range(steps)
    ]
    return lines, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("method", ["dpo", "otpo", "sampo", "aot", "aot-unpaired"])
def test_loss_at_step_0_is_ln_2_and_accumulation_changes_nothing(method):
    whole, parameters = step(method, [[0, 1, 2]])
    assert whole[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert whole[2]["loss"] < whole[0]["loss"] - 1e-3, "the loss falls"
    for groups in ([[0], [1], [2]], [[2, 0], [1]]):
        parts, others = step(method, groups)
        for number, (a, b) in enumerate(zip(whole, parts, strict=True)):
            # at step 0 both rewards are 0 up to rounding: which one is larger depends on the machine
            apart = {"tokens"} if number else {"tokens", "rewards/accuracies"}
            assert {k: v for k, v in a.items() if k not in apart} == pytest.approx(
                {k: v for k, v in b.items() if k not in apart}, rel=1e-4, abs=1e-5
            )
            assert a["tokens"] == b["tokens"] == 2 * 10 + 9 + 12, "prompts twice, completions once, no padding"
        for a, b in zip(parameters, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PAIR_METHODS)
def test_every_method_takes_a_finite_step(name):
    lines, _ = step(name, [[0, 1], [2]], steps=2, lr=1e-3)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert {"rewards/margins", "rewards/accuracies", "logps/chosen", "lengths/chosen"} <= set(lines[0])


def test_a_padding_row_counts_for_nothing():
    model = PolicyModel(small_lm())
    losses = preference_losses(model, resolve("otpo", {}), reference(model), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    padding = collate_pairs([replace(PAIRS[1], row=-1)])
    found = [
        optimisation_step(model, optimizer, batches, losses, denominator=3, max_grad_norm=1.0, lr=0.0)
        for batches in (batches_of([0, 1, 2]), [*batches_of([0, 1, 2]), padding])
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_metrics_are_means_over_pairs_and_evaluation_has_the_same_under_other_names():
    model = PolicyModel(small_lm())
    losses = preference_losses(model, resolve("dpo", {}), reference(model), seed=0)
    figures = evaluate(batches_of([0, 1], [2]), losses, denominator=3)
    with torch.no_grad():
        logps, _ = model(collate_pairs(PAIRS))
    assert figures["eval_logps/chosen"] == pytest.approx(logps[:3].sum(-1).mean().item(), rel=1e-5)
    assert figures["eval_logps/rejected"] == pytest.approx(logps[3:].sum(-1).mean().item(), rel=1e-5)
    assert figures["eval_lengths/chosen"] == 3 and figures["eval_lengths/rejected"] == 4
    assert figures["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_supervised_loss_is_transformers_cross_entropy():
    lm = small_lm()
    items = [TokenCompletion(p.row, p.prompt_ids, p.chosen_ids) for p in PAIRS]
    tokens = sum(len(p.chosen_ids) for p in PAIRS)
    figures = evaluate([collate_completions(items)], supervised_losses(PolicyModel(small_lm())), denominator=tokens)
    total = 0.0
    for pair in PAIRS:
        ids = torch.tensor([pair.prompt_ids + pair.chosen_ids])
        labels = ids.clone()
        labels[:, : len(pair.prompt_ids)] = -100
        total += lm(ids, labels=labels).loss.item() * len(pair.chosen_ids)
    assert figures["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_the_gradient_is_clipped_and_its_norm_reported_as_it_was():
    free, _ = step("dpo", [[0, 1, 2]], steps=1, max_grad_norm=1e9)
    model = PolicyModel(small_lm())
    before = [p.detach().clone() for p in model.parameters()]
    losses = preference_losses(model, resolve("dpo", {}), reference(model), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    clipped = optimisation_step(
        model, optimizer, batches_of([0, 1, 2]), losses, denominator=3, max_grad_norm=0.01, lr=1.0
    )
    assert clipped["grad_norm"] == pytest.approx(free[0]["grad_norm"], rel=1e-5) and clipped["grad_norm"] > 0.01
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, model.parameters(), strict=True)]).norm().item()
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_a_norm_of_0_clips_nothing():
    """As with transformers' Trainer."""
    _, free = step("dpo", [[0, 1, 2]], steps=1, max_grad_norm=1e9)
    _, off = step("dpo", [[0, 1, 2]], steps=1, max_grad_norm=0)
    assert all(torch.equal(a, b) for a, b in zip(free, off, strict=True))
    _, clipped = step("dpo", [[0, 1, 2]], steps=1, max_grad_norm=1e-9)
    assert not all(torch.equal(a, b) for a, b in zip(free, clipped, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_rows_and_leaves_the_model_alone(bad):
    model = PolicyModel(small_lm())
    before = [p.detach().clone() for p in model.parameters()]

    def losses(batch):
        logps, _ = model(batch)
        losses = logps.sum(-1)[: len(batch.rows) // 2]
        return LossOutput(torch.where(batch.rows[: len(losses)] == 1, bad * losses, losses))

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(WorkError, match=r"not finite\. Data rows .*\[1\]"):
        optimisation_step(model, optimizer, batches_of([0, 1], [2]), losses, denominator=3, max_grad_norm=1.0, lr=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
