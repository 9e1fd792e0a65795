"""Reward models: the loss against TRL and closed forms, scores in every layout, what is learnt, exported and used."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from support.architectures import FAMILIES, SEQUENCES, make
from support.architectures import PAIRS as ARCHITECTURE_PAIRS
from support.random_pairs import spec_of
from support.reward import export_reward_model
from support.small_lm import PAIRS, small_lm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from otpo.data.collate import collate_completions, collate_pairs
from otpo.errors import UserError, WorkError
from otpo.methods.losses.reward import bradley_terry
from otpo.methods.spec import resolve
from otpo.models.reward_model import RewardModel, load_reward_lm
from otpo.records import TokenCompletion, TokenPair
from otpo.training.objectives.reward import load_margins, margins_of, reward_losses, save_margins
from otpo.training.step import evaluate, optimisation_step


@pytest.fixture(scope="module")
def exported(tiny_llama, tmp_path_factory):
    return export_reward_model(tiny_llama, tmp_path_factory.mktemp("reward"))


# ---- the loss ----


def trl_loss(chosen, rejected, margins, coefficient):
    """Loss and metrics of TRL's RewardTrainer on the same scores."""
    from trl.trainer.reward_trainer import RewardTrainer

    def same(values):
        return values

    model = SimpleNamespace(training=True)
    trainer = SimpleNamespace(
        model=model,
        args=SimpleNamespace(center_rewards_coefficient=coefficient),
        accelerator=SimpleNamespace(gather_for_metrics=same, gather=same),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    logits = torch.cat([chosen, rejected])[:, None]
    inputs = {"attention_mask": torch.ones(len(logits), 2)} | ({} if margins is None else {"margin": margins})
    loss = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), inputs)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("coefficient", [None, 0.01, 0.7])
@pytest.mark.parametrize("with_margin", [False, True])
def test_loss_and_metrics_are_trls(coefficient, with_margin):
    generator = torch.Generator().manual_seed(1)
    chosen, rejected, margins = 2 * torch.randn(3, 9, generator=generator)
    margins = margins.abs() if with_margin else None
    expected, logged = trl_loss(chosen, rejected, margins, coefficient)
    output = bradley_terry(chosen, rejected, margins, center_rewards_coefficient=coefficient or 0.0)
    assert output.losses.shape == (9,)
    torch.testing.assert_close(output.losses.mean(), expected)
    for ours, theirs in (("rewards/accuracies", "accuracy"), ("rewards/margins", "margin"), ("mean_reward",) * 2):
        assert output.metrics[ours].mean().item() == pytest.approx(logged[theirs], abs=1e-6)


def test_closed_forms():
    def loss(chosen, rejected, margin=None, c=0.0):
        margins = None if margin is None else torch.tensor([margin])
        return bradley_terry(
            torch.tensor([chosen]), torch.tensor([rejected]), margins, center_rewards_coefficient=c
        ).losses.item()

    assert loss(0.0, 0.0) == pytest.approx(math.log(2))
    assert loss(3.0, 1.0) == pytest.approx(math.log(1 + math.exp(-2)))
    assert loss(3.0, 1.0, margin=2.0) == pytest.approx(math.log(2))
    assert loss(3.0, 1.0, c=0.01) == pytest.approx(math.log(1 + math.exp(-2)) + 0.16)
    assert loss(-200.0, 200.0) == pytest.approx(400.0), "no overflow"


def test_gradient():
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, margins = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    scores = (chosen.requires_grad_(), rejected.requires_grad_())
    for given in (None, margins):
        assert torch.autograd.gradcheck(
            lambda a, b, given=given: bradley_terry(a, b, given, center_rewards_coefficient=0.3).losses, scores
        )


# ---- scores ----


def reward_model(folder, **changes) -> RewardModel:
    """A small decoder with a head that is not zero."""
    small_lm(**changes).save_pretrained(folder)
    model = RewardModel(load_reward_lm(folder, new_head=True, pad_id=0)).eval()
    torch.nn.init.normal_(model.lm.score.weight, generator=torch.Generator().manual_seed(2))
    return model


def test_a_new_head_scores_zero_and_its_loss_is_log_2(tmp_path):
    small_lm().save_pretrained(tmp_path)
    model = RewardModel(load_reward_lm(tmp_path, new_head=True))
    batch = collate_pairs(PAIRS)
    assert model.scores(batch).tolist() == [0.0] * 6
    output = reward_losses(model, resolve("reward-model", {}))(batch)
    assert output.losses.tolist() == pytest.approx([math.log(2)] * 3)


def test_scores_are_those_of_transformers_one_answer_at_a_time_in_every_layout(tmp_path):
    model = reward_model(tmp_path / "a")
    padded = reward_model(tmp_path / "b")
    padded.lm.set_attn_implementation("eager")
    padded.backbone.shares_prompts = False
    plain = padded.lm
    completions = [p.chosen_ids for p in PAIRS] + [p.rejected_ids for p in PAIRS]
    with torch.no_grad():
        expected = [
            plain(input_ids=torch.tensor([pair.prompt_ids + ids])).logits.item()
            for pair, ids in zip(PAIRS * 2, completions, strict=True)
        ]
        assert max(expected) - min(expected) > 0.5
        singles = [
            TokenCompletion(i, p.prompt_ids, ids) for i, (p, ids) in enumerate(zip(PAIRS * 2, completions, strict=True))
        ]
        for found in (
            model.scores(collate_pairs(PAIRS)),
            padded.scores(collate_pairs(PAIRS)),
            model.scores(collate_completions(singles)),
        ):
            assert found.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_transformers_for_every_architecture(family, tmp_path):
    make(family, "sdpa").save_pretrained(tmp_path)
    if family in ("granite", "cohere"):
        with pytest.raises(UserError, match="No reward model could be loaded"):
            load_reward_lm(tmp_path, new_head=True)
        return
    ours = RewardModel(load_reward_lm(tmp_path, new_head=True, pad_id=0)).eval()
    torch.nn.init.normal_(ours.lm.score.weight, generator=torch.Generator().manual_seed(2))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, attn_implementation="eager")
    plain.eval().score.load_state_dict(ours.lm.score.state_dict())
    with torch.no_grad():
        expected = [
            plain(torch.tensor([prompt + completion]), use_cache=False).logits.item()
            for prompt, completion in SEQUENCES
        ]
        assert ours.scores(collate_pairs(ARCHITECTURE_PAIRS)).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert max(expected) - min(expected) > 0.1


def test_scores_that_are_not_finite_name_row_and_side(tmp_path):
    model = reward_model(tmp_path)
    model.lm.get_input_embeddings().weight.data[14] = math.nan  # the end of the first rejected completion
    losses = reward_losses(model, resolve("reward-model", {}))
    with pytest.raises(WorkError, match="infinity in data row 0: scores of the reward model, rejected completion"):
        evaluate([collate_pairs(PAIRS)], losses, denominator=3)


# ---- training ----


def gradient(model, spec, groups, margins=None):
    model.zero_grad()
    losses = reward_losses(model, spec, margins)
    total = sum(losses(collate_pairs(group)).losses.sum() for group in groups) / 3
    total.backward()
    return total.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_micro_batches_change_nothing(tmp_path):
    model, margins = reward_model(tmp_path), {0: 0.5, 1: 0.0, 2: 2.0}
    spec = resolve("reward-model", {"center_rewards_coefficient": 0.1})
    whole, together = gradient(model, spec, [PAIRS], margins)
    parts, apart = gradient(model, spec, [PAIRS[:1], PAIRS[1:]], margins)
    assert parts == pytest.approx(whole, rel=1e-6)  # a sum near 18, whose float32 neighbours are 2e-6 apart
    torch.testing.assert_close(apart, together, atol=1e-5, rtol=1e-4)


def test_margins_belong_to_rows_and_swapped_answers_prefer_the_other(tmp_path):
    model, batch = reward_model(tmp_path), collate_pairs(PAIRS)
    chosen, rejected = model.scores(batch).detach().chunk(2)
    found = reward_losses(model, resolve("reward-model", {}), {0: 0.5, 2: 2.0})(batch).losses
    expected = -torch.nn.functional.logsigmoid(chosen - rejected - torch.tensor([0.5, 0.0, 2.0]))
    torch.testing.assert_close(found, expected)
    swapped = reward_losses(model, resolve("reward-model", {"swap_answers": True}))(batch)
    torch.testing.assert_close(swapped.losses, -torch.nn.functional.logsigmoid(rejected - chosen))
    assert swapped.metrics["lengths/chosen"].tolist() == [2, 7, 3]


def separable(n: int, seed: int) -> list[TokenPair]:
    """Pairs whose chosen completion holds token 7 somewhere and whose rejected one does not."""
    draw = random.Random(seed)
    pairs = []
    for row in range(n):
        prompt, chosen, rejected = ([draw.randint(10, 60) for _ in range(draw.randint(2, 6))] for _ in range(3))
        chosen[draw.randrange(len(chosen))] = 7
        pairs.append(TokenPair(row, prompt, [*chosen, 9], [*rejected, 9]))
    return pairs


def test_a_separable_preference_is_learnt(tmp_path):
    """It is read from the last token, which is the same everywhere: the decoder has to carry it there."""
    small_lm().save_pretrained(tmp_path)
    model = RewardModel(load_reward_lm(tmp_path, new_head=True))
    losses = reward_losses(model, resolve("reward-model", {"center_rewards_coefficient": 0.01}))
    train, unseen = (collate_pairs(separable(n, seed)) for n, seed in ((160, 0), (64, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    figures = [
        optimisation_step(model, optimizer, [train], losses, denominator=160, max_grad_norm=1.0, lr=3e-3)
        for _ in range(40)
    ]
    assert figures[0]["loss"] == pytest.approx(math.log(2)) and figures[-1]["loss"] < 0.1
    assert figures[0]["rewards/accuracies"] == 0 and figures[-1]["rewards/accuracies"] == 1
    assert abs(figures[-1]["mean_reward"]) < 1 < figures[-1]["rewards/margins"]
    assert evaluate([unseen], losses, denominator=64)["eval_rewards/accuracies"] > 0.9


def test_twenty_steps_are_those_of_trls_trainer(exported, tmp_path):
    """Same tokens, same order, same start, with margins and centred rewards."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl import RewardConfig, RewardTrainer

    pairs = separable(80, 3)
    margins = {pair.row: pair.row % 3 / 2 for pair in pairs}
    found = []

    class Recording(RewardTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            found.append(loss.item())
            return loss

    rows = {
        "chosen_ids": [p.prompt_ids + p.chosen_ids for p in pairs],
        "rejected_ids": [p.prompt_ids + p.rejected_ids for p in pairs],
        "margin": list(margins.values()),
    }
    config = RewardConfig(
        str(tmp_path), per_device_train_batch_size=4, max_steps=20, learning_rate=1e-3, lr_scheduler_type="constant",
        gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, center_rewards_coefficient=0.02,
    )  # fmt: skip
    Recording(
        AutoModelForSequenceClassification.from_pretrained(exported), args=config,
        train_dataset=Dataset.from_dict(rows), processing_class=AutoTokenizer.from_pretrained(exported),
    ).train()  # fmt: skip

    model = RewardModel(load_reward_lm(exported)).eval()
    losses = reward_losses(model, resolve("reward-model", {"center_rewards_coefficient": 0.02}), margins)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    ours = [
        optimisation_step(
            model, optimizer, [collate_pairs(pairs[i : i + 2]) for i in (4 * step, 4 * step + 2)], losses,
            denominator=4, max_grad_norm=1.0, lr=1e-3,
        )["loss"]
        for step in range(20)
    ]  # fmt: skip
    assert len(found) == 20 and ours == pytest.approx(found, rel=1e-4)
    assert max(ours) - min(ours) > 0.05, "the losses move"


# ---- margins ----


def test_margins_are_read_from_the_pairs_rows_and_kept_in_a_file(tmp_path):
    rows = [{"margin": 1}, {"margin": None}, {"margin": "0.25"}]
    margins = margins_of(iter(rows), [0, 2], "x.json")
    assert margins == {0: 1.0, 2: 0.25}, "rows that make no pair need none"
    save_margins(tmp_path / "margins.safetensors", margins)
    assert load_margins(tmp_path / "margins.safetensors") == margins
    assert margins_of([{}, {}, {}], [0, 2], "x.json") is None
    for wrong, words in (({}, "no margin"), ({"margin": "far"}, "not a number"), ({"margin": math.inf}, "finite")):
        with pytest.raises(UserError, match=rf"x\.json: row 2.*{words}"):
            margins_of([rows[0], {}, wrong], [0, 2], "x.json")


# ---- what is refused ----


def test_a_likelihood_of_a_reward_model_is_refused():
    with pytest.raises(UserError, match=r"methods\.rm\.sft_weight.*no likelihood"):
        resolve("rm", {"method": "reward-model", "sft_weight": 0.1})
    with pytest.raises(UserError, match=r"methods\.reward-model\.center_rewards_coefficient.*at least 0"):
        spec_of("reward-model", center_rewards_coefficient=-1)


def test_a_causal_lm_is_no_reward_model(tmp_path):
    small_lm().save_pretrained(tmp_path / "lm")
    with pytest.raises(UserError, match=r"no reward model.*score\.weight.*method: reward-model"):
        load_reward_lm(tmp_path / "lm")
    with pytest.raises(UserError, match="No reward model could be loaded"):
        load_reward_lm(tmp_path / "nothing")
