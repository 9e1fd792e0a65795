"""KTO's rows (split from pairs, with mismatched completions) and steps that batching does not change."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.random_pairs import spec_of
from support.small_lm import PAIRS, small_lm

from otpo.data.unpaired import collate_unpaired, mismatched, split_pairs, unpaired_prompts
from otpo.errors import UserError, WorkError
from otpo.models.policy import PolicyModel
from otpo.records import PromptCompletions, TokenCompletion
from otpo.training.objectives.unpaired import unpaired_losses
from otpo.training.step import evaluate, optimisation_step

# ---- the rows ----


def labelled(prompts):
    """A row for each prompt; completions are all different."""
    return [TokenCompletion(row, [1, prompt], [100 + row], row % 3 == 0) for row, prompt in enumerate(prompts)]


@given(st.lists(st.integers(0, 12), min_size=2, max_size=40), st.integers(0, 99))
def test_a_mismatched_completion_is_of_another_prompt(prompts, seed):
    items = labelled(prompts)
    if len(set(prompts)) == 1:
        with pytest.raises(UserError, match="at least two prompts"):
            mismatched(items, seed=seed)
        return
    matched = mismatched(items, seed=seed)
    others = [item.mismatched_ids[0] - 100 for item in matched]
    assert all(prompts[row] != prompts[other] for row, other in enumerate(others))
    assert [(m.row, m.prompt_ids, m.completion_ids, m.label) for m in matched] == [
        (i.row, i.prompt_ids, i.completion_ids, i.label) for i in items
    ]
    if 2 * Counter(prompts).most_common(1)[0][1] <= len(prompts):
        assert sorted(others) == list(range(len(prompts))), "each completion is used once"


def test_the_pairing_goes_by_seed_alone():
    items = labelled(range(50))
    assert mismatched(items, seed=3) == mismatched(items, seed=3) != mismatched(items, seed=4)


def test_a_mismatched_completion_is_cut_to_the_room_its_prompt_leaves():
    items = [TokenCompletion(0, [1] * 7, [2], True), TokenCompletion(1, [3], [4] * 9, False)]
    found = mismatched(items, seed=0, max_length=10)
    assert [item.mismatched_ids for item in found] == [[4] * 3, [2]]


def test_pairs_are_split_as_trl_does():
    from datasets import Dataset
    from trl.data_utils import unpair_preference_dataset

    columns = {
        "prompt": [p.prompt_ids for p in PAIRS],
        "chosen": [p.chosen_ids for p in PAIRS],
        "rejected": [p.rejected_ids for p in PAIRS],
    }
    theirs = unpair_preference_dataset(Dataset.from_dict(columns))
    ours = split_pairs(PAIRS)
    assert sorted((i.prompt_ids, i.completion_ids, i.label) for i in ours) == sorted(
        (row["prompt"], row["completion"], row["label"]) for row in theirs
    )
    assert [item.row for item in ours] == [0, 0, 1, 1, 2, 2]


def test_each_labelled_completion_has_a_cache_key_of_its_own():
    items = mismatched(split_pairs(PAIRS), seed=0)
    prompts = list(unpaired_prompts(items))
    keys = [prompt.key for prompt in prompts]
    assert len(set(keys)) == 6
    assert prompts[0] == PromptCompletions(
        keys[0], items[0].prompt_ids, (items[0].completion_ids, items[0].mismatched_ids or [])
    )
    batch = collate_unpaired(items)
    assert batch.keys == tuple(keys)
    padding = collate_unpaired([*items[:2], replace(items[2], row=-1), *items[3:]])
    assert padding.keys == (*keys[:2], -1, *keys[3:])


# ---- steps ----

ITEMS = mismatched(split_pairs(PAIRS), seed=0)
ALL = [[0, 1, 2, 3, 4, 5]]


def reference():
    frozen = PolicyModel(small_lm())

    @torch.no_grad()
    def logps(batch):
        return frozen(batch)[0], frozen(batch.mismatched)[0]

    return logps


def batches_of(groups, items=ITEMS):
    return [collate_unpaired([items[i] for i in group]) for group in groups]


def train(groups, *, steps=4, items=ITEMS, padding=False, **settings):
    """(figures of each step, the model's parameters after the last)."""
    model = PolicyModel(small_lm())
    losses = unpaired_losses(model, spec_of("kto", **settings), reference())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = batches_of(groups, items)
    if padding:
        batches.append(collate_unpaired([replace(items[3], row=-1)]))
    lines = [
        optimisation_step(model, optimizer, batches, losses, denominator=len(items), max_grad_norm=1.0, lr=0.05)
        for _ in range(steps)
    ]
    return lines, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("groups", [[[0], [1], [2], [3], [4], [5]], [[5, 1], [0, 2, 4, 3]]])
def test_micro_batches_change_nothing(groups):
    """Not even ones without a desirable completion, or of one row, where TRL's KL term is the reward itself."""
    whole, parameters = train(ALL)
    parts, others = train(groups)
    assert whole[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert whole[-1]["loss"] < 0.45 and whole[-1]["kl"] > 0.01 and whole[-1]["rewards/margins"] > 0.1
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, rel=2e-5, abs=2e-6) and a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert a["tokens"] == 2 * 10 + 9 + 12, "each prompt with each completion; mismatched completions do not count"
    for a, b in zip(parameters, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_kl_term_is_of_the_mismatched_completions():
    lines, _ = train(ALL, steps=2)
    model = PolicyModel(small_lm())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    losses = unpaired_losses(model, spec_of("kto"), reference())
    optimisation_step(model, optimizer, batches_of(ALL), losses, denominator=6, max_grad_norm=1.0, lr=0.05)
    start, trained, total = small_lm(), small_lm(), 0.0
    trained.load_state_dict(model.lm.state_dict())  # a model of its own, with transformers' attention
    for item in ITEMS:
        ids = torch.tensor([item.prompt_ids + item.mismatched_ids])
        with torch.no_grad():
            now, before = (lm(ids).logits.log_softmax(-1) for lm in (trained, start))
        for place in range(len(item.prompt_ids), ids.shape[1]):
            token = ids[0, place]
            total += (now[0, place - 1, token] - before[0, place - 1, token]).item()
    assert lines[1]["kl"] == pytest.approx(max(total / 6, 0), rel=1e-4) and total > 0


def test_a_padding_row_counts_for_nothing():
    assert train(ALL, padding=True)[0] == [pytest.approx(line, rel=1e-5, abs=1e-6) for line in train(ALL)[0]]


def test_swapped_answers_are_swapped_labels():
    flipped = [TokenCompletion(i.row, i.prompt_ids, i.completion_ids, not i.label, i.mismatched_ids) for i in ITEMS]
    assert train(ALL, swap_answers=True)[0] == [
        pytest.approx(line, rel=1e-6, abs=1e-7) for line in train(ALL, items=flipped)[0]
    ]


def test_evaluation_has_a_steps_figures():
    model = PolicyModel(small_lm())
    losses = unpaired_losses(model, spec_of("kto"), reference())
    figures = evaluate(batches_of([[0, 3], [1, 2, 4, 5]]), losses, denominator=6)
    step, _ = train(ALL, steps=1)
    expected = {f"eval_{name}": value for name, value in step[0].items() if name not in ("grad_norm", "learning_rate")}
    assert figures == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("others", [False, True])
def test_a_number_that_is_not_finite_names_the_row_and_the_completion(others):
    start = reference()

    def broken(batch):
        values = start(batch)
        values[others][batch.rows == 1, 0] = math.nan
        return values

    batch = batches_of([[0, 3, 4]])
    expected = "mismatched completion" if others else "undesirable completion"
    losses = unpaired_losses(PolicyModel(small_lm()), spec_of("kto"), broken)
    with pytest.raises(WorkError, match=f"data row 1: log-probabilities of 'reference', {expected}") as error:
        evaluate(batch, losses, denominator=3)
    assert "row 0" not in str(error.value) and "row 2" not in str(error.value)


# ---- TRL's whole trainer ----


def test_twenty_steps_are_those_of_trls_trainer(tmp_path, tiny_llama):
    """Same tokens, same order, TRL's own pairing: with a batch in one piece its KL term is that of the batch."""
    from conftest import SENTENCES
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    rows = {
        "prompt": [f"{SENTENCES[i % 10][: 20 + i]} " for i in range(80)],
        "completion": [SENTENCES[(3 * i + 1) % 10][: 30 + i % 7] for i in range(80)],
        "label": [i % 3 > 0 for i in range(80)],
    }
    found = []

    class Recording(KTOTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            found.append(loss.item())
            return loss

    config = KTOConfig(
        str(tmp_path), per_device_train_batch_size=4, max_steps=20, learning_rate=1e-3, lr_scheduler_type="constant",
        gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none", save_strategy="no", beta=0.1,
        precompute_ref_log_probs=True, disable_tqdm=True, desirable_weight=1.2,
    )  # fmt: skip
    trainer = Recording(
        AutoModelForCausalLM.from_pretrained(tiny_llama), args=config, train_dataset=Dataset.from_dict(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
    )  # fmt: skip
    items = [
        TokenCompletion(number, row["prompt_ids"], row["completion_ids"], row["label"], row["KL_completion_ids"])
        for number, row in enumerate(trainer.train_dataset)
    ]
    trainer.train()

    policy, frozen = (PolicyModel(AutoModelForCausalLM.from_pretrained(tiny_llama)).eval() for _ in range(2))

    @torch.no_grad()
    def start(batch):
        return frozen(batch)[0], frozen(batch.mismatched)[0]

    losses = unpaired_losses(policy, spec_of("kto", desirable_weight=1.2), start)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    ours = [
        optimisation_step(
            policy, optimizer, batches_of([[4 * step, 4 * step + 3], [4 * step + 1, 4 * step + 2]], items), losses,
            denominator=4, max_grad_norm=1.0, lr=1e-3,
        )["loss"]
        for step in range(20)
    ]  # fmt: skip
    assert len(found) == 20 and ours == pytest.approx(found, rel=1e-4)
    assert max(ours) - min(ours) > 0.05, "the losses move"
