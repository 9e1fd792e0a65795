"""Reward models: the loss against TRL and closed forms, scores in every layout, what is learnt, exported and used."""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from support.architectures import FAMILIES, SEQUENCES, make
from support.architectures import PAIRS as ARCHITECTURE_PAIRS
from support.command import otpo, refused
from support.random_pairs import spec_of
from support.small_lm import PAIRS, small_lm
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from eval.judge.config import JudgeConfig
from eval.judge.reward_scores import judge_by_scores
from eval.judge.verdicts import COLUMNS, ledger
from eval.stats.win_rate import by_prompt
from eval.tasks import Prompt, Task
from otpo.data.collate import collate_completions, collate_pairs
from otpo.errors import UserError, WorkError
from otpo.methods.losses.reward import bradley_terry
from otpo.methods.spec import resolve
from otpo.models.export import export
from otpo.models.reward_model import RewardModel, RewardScorer, load_reward_lm, pad_token
from otpo.models.sharding import shard
from otpo.records import TokenCompletion, TokenPair
from otpo.training.objectives.reward import load_margins, margins_of, reward_losses, save_margins
from otpo.training.step import evaluate, optimisation_step
from pipeline.generate.engine import EngineConfig, Sampling
from pipeline.generate.pairs import sample_pairs
from pipeline.generate.pool import EnginePool
from pipeline.judge.reward_model import RewardJudge

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
    with pytest.raises(WorkError, match="found NaN or infinity in data row 0, rejected completion"):
        reward_losses(model, resolve("reward-model", {}))(collate_pairs(PAIRS))


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
    pairs = [TokenPair(0, [1], [2], [3]), TokenPair(2, [1], [2], [3])]
    margins = margins_of(rows, pairs, "x.json")
    assert margins == {0: 1.0, 2: 0.25}, "rows that make no pair need none"
    save_margins(tmp_path / "margins.safetensors", margins)
    assert load_margins(tmp_path / "margins.safetensors") == margins
    assert margins_of([{}, {}, {}], pairs, "x.json") is None
    for wrong, words in (({}, "no margin"), ({"margin": "far"}, "not a number"), ({"margin": math.inf}, "finite")):
        with pytest.raises(UserError, match=rf"x\.json: row 2.*{words}"):
            margins_of([rows[0], {}, wrong], pairs, "x.json")


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


# ---- export and use ----


def score(folder, prompts, completions, template="auto") -> list[float]:
    return RewardScorer(folder, template=template)(prompts, completions)


@pytest.fixture(scope="module")
def exported(tiny_llama, tmp_path_factory):
    """A reward model with a head that is not zero, sharded and exported as the worker does it.

    Its start pads with EOS, as many do: the export must not.
    """
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.pad_token = tokenizer.eos_token
    start = tmp_path_factory.mktemp("start")
    tokenizer.save_pretrained(start)
    pad = pad_token(tokenizer)
    model = RewardModel(load_reward_lm(tiny_llama, new_head=True, pad_id=pad))
    torch.nn.init.normal_(model.lm.score.weight, generator=torch.Generator().manual_seed(2))
    model = shard(model, init_device_mesh("cpu", (1,)), dtype=torch.float32)
    out = tmp_path_factory.mktemp("reward") / "model"
    export(model, out, tokenizer=str(start), card="# card", dtype=torch.float32, pad_id=pad)
    dist.destroy_process_group()
    return out


PROMPTS = ["What is the capital of Mongolia?", "Summarize the letter.", "Where is the bicycle?"]
COMPLETIONS = ["Ulaanbaatar.", "Both sisters are well, and they keep their names.", ""]


def test_the_exported_folder_is_a_classifier_with_the_same_scores(exported):
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    lm = AutoModelForSequenceClassification.from_pretrained(exported).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    assert lm.config.num_labels == 1 and lm.score.weight.shape == (1, 64) and lm.score.bias is None
    assert lm.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    texts = [p + a + tokenizer.eos_token for p, a in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.no_grad():
        for side in ("right", "left"):
            inputs = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")
            expected = lm(**inputs).logits[:, 0].tolist()
            found = score(exported, PROMPTS, COMPLETIONS, template="literal")
            assert found == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 3) for value in found}) == 3


def test_messages_and_strings_in_the_template_score_alike_and_batches_change_nothing(exported):
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    seen = []
    found = RewardScorer(exported, batch_size=1)(PROMPTS, COMPLETIONS, lambda *counts: seen.append(counts))
    assert score(exported, messages, COMPLETIONS, template="literal") == pytest.approx(found, abs=1e-5)
    assert found != pytest.approx(score(exported, PROMPTS, COMPLETIONS, template="literal"), abs=1e-3)
    assert seen == [(1, 3), (2, 3), (3, 3)] and score(exported, [], []) == []


def test_a_model_that_was_padded_with_eos_is_read_where_transformers_reads_it(exported, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(exported)
    lm = AutoModelForSequenceClassification.from_pretrained(exported).eval()
    lm.config.pad_token_id = tokenizer.eos_token_id
    lm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = tokenizer(PROMPTS[0] + COMPLETIONS[0] + tokenizer.eos_token, return_tensors="pt")
    with torch.no_grad():
        expected = lm(**ids).logits.item()
    assert score(tmp_path, PROMPTS[:1], COMPLETIONS[:1], template="literal") == pytest.approx([expected], abs=1e-5)
    assert score(exported, PROMPTS[:1], COMPLETIONS[:1], template="literal") != pytest.approx([expected], abs=1e-3)


def test_a_padding_token_is_found_that_ends_no_answer(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    own = tokenizer.pad_token_id
    assert own != tokenizer.eos_token_id and pad_token(tokenizer) == own
    tokenizer.pad_token = tokenizer.eos_token
    assert pad_token(tokenizer) not in (None, tokenizer.eos_token_id)


# ---- as a judge ----


def outputs(name: str, texts: list[str]) -> list[dict]:
    return [{"instruction": p, "output": text, "generator": name} for p, text in zip(PROMPTS, texts, strict=True)]


OTHERS = [COMPLETIONS[0], "No.", "In the shed, behind the newer one."]


def test_two_scores_are_a_preference_in_alpaca_evals_convention(exported):
    asked = []

    def scores(pairs):
        asked.append(list(pairs))
        return score(exported, *zip(*pairs, strict=True))

    frame = judge_by_scores(outputs("ours", OTHERS), outputs("base", COMPLETIONS), scores, "small")
    ours, theirs = score(exported, PROMPTS, OTHERS), score(exported, PROMPTS, COMPLETIONS)
    expected = [1.5] + [2 - 1 / (1 + math.exp(a - b)) for a, b in zip(ours[1:], theirs[1:], strict=True)]
    assert frame["preference"].tolist() == pytest.approx(expected, abs=1e-6)
    assert list(frame.columns) == list(COLUMNS) and set(frame["order"]) == {"none"} and frame["error"].isna().all()
    assert json.loads(frame["raw"][1]) == pytest.approx({"score": ours[1], "reference_score": theirs[1]}, abs=1e-5)
    assert len(asked) == 1 and (PROMPTS[0], COMPLETIONS[0]) not in asked[0], "identical outputs are a draw"
    assert ledger(frame) | {"spent_usd": 0} == ledger(frame) and ledger(frame)["identical"] == 1
    prompts = by_prompt(frame)
    assert prompts["preference"].tolist() == frame["preference"].tolist() and prompts["flipped"].isna().all()


@pytest.mark.parametrize("difference", [-900.0, 0.0, 900.0])
def test_far_scores_do_not_overflow(difference):
    frame = judge_by_scores(
        outputs("ours", ["a", "b", "c"]), outputs("base", ["x", "y", "z"]),
        lambda pairs: [difference if text in "abc" else 0.0 for _, text in pairs], "small",
    )  # fmt: skip
    assert frame["preference"].tolist() == [1.0 if difference < 0 else 1.5 if difference == 0 else 2.0] * 3


def test_each_answer_is_scored_once_and_messages_stand_for_instructions(exported):
    counts = []
    judge = RewardJudge(exported, progress=lambda what, done, total, remark: counts.append(total))
    first = judge([(PROMPTS[0], "a"), (PROMPTS[0], "b"), (PROMPTS[0], "a")])
    assert first[0] == first[2] != first[1] and judge([(PROMPTS[0], "b")]) == first[1:2] and counts == [2]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPTS[1]}]
    found = judge([(PROMPTS[1], "a")], [messages])
    assert found == pytest.approx(score(exported, [messages], ["a"]), abs=1e-5)
    assert found != pytest.approx(score(exported, PROMPTS[1:2], ["a"]), abs=1e-3)


@pytest.mark.slow
def test_the_command_judges_with_a_reward_model(exported, tmp_path):
    for name, texts in (("ours", OTHERS), ("base", COMPLETIONS)):
        (tmp_path / f"{name}.json").write_text(json.dumps(outputs(name, texts)))
    files = [tmp_path / "ours.json", "--reference", tmp_path / "base.json", "--out", tmp_path / "board"]
    done = otpo(tmp_path, "judge", *files, "--reward-model", exported, "--task", "small")
    assert done.code == 0, done.err
    verdicts = pd.read_parquet(tmp_path / "board" / "verdicts.parquet")
    ours, theirs = score(exported, PROMPTS, OTHERS), score(exported, PROMPTS, COMPLETIONS)
    wins = [0.5] + [1 / (1 + math.exp(b - a)) for a, b in zip(ours[1:], theirs[1:], strict=True)]
    assert (verdicts["preference"] - 1).tolist() == pytest.approx(wins, abs=1e-5)
    row = pd.read_csv(tmp_path / "board" / "leaderboard.csv").iloc[0]
    assert row["win_rate"] == pytest.approx(100 * sum(wins) / 3, abs=1e-3)
    assert row["protocol"] == "reward" and row["judge"] == exported.parent.name
    assert f"scored by the reward model {exported.parent.name}" in (tmp_path / "board" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--reward-model", "MODEL", "--judge-url", "http://127.0.0.1:9/v1"], ["in place of --judge-url", "keep one"]),
        ([], ["Who judges?", "--reward-model FOLDER"]),
        (["--reward-model", "LM"], ["expected a reward model", "LlamaForCausalLM", "method: reward-model"]),
        (["--reward-model", "./none"], ["there is no folder './none'"]),
    ],
)
def test_a_judge_that_cannot_be_is_refused(exported, tiny_llama, tmp_path, options, words):
    for name, texts in (("ours", OTHERS), ("base", COMPLETIONS)):
        (tmp_path / f"{name}.json").write_text(json.dumps(outputs(name, texts)))
    named = {"MODEL": exported, "LM": tiny_llama}
    files = [tmp_path / "ours.json", "--reference", tmp_path / "base.json", "--out", tmp_path / "board"]
    refused(otpo(tmp_path, "judge", *files, *[named.get(word, word) for word in options]), *words)


def test_a_reward_model_in_a_recipe_names_the_judge():
    config = JudgeConfig(reward_model="runs/x/models/rm/model", protocol="summary")
    assert (config.model, config.protocol) == ("rm", "reward") and JudgeConfig(**config.model_dump()) == config
    assert JudgeConfig(reward_model="owner/name-rm").model == "name-rm" and JudgeConfig().reward_model is None
    assert JudgeConfig(reward_model="inputs/17/model", model="rm").model == "rm"
    with pytest.raises(ValueError, match="in place of a judge's url"):
        JudgeConfig(reward_model="rm", url="http://127.0.0.1:9/v1")


@pytest.mark.slow
def test_a_reward_model_scores_sampled_answers_into_pairs(exported, ray_cluster, sharp_models, tmp_path):
    scorer = JudgeConfig(reward_model=str(exported))
    task = Task("test", [Prompt(str(i), text, "test") for i, text in enumerate(PROMPTS)], "here", "instruction")
    sampling, out = Sampling(temperature=1.0, max_tokens=12, n=4, seed=1), tmp_path / "pairs.jsonl"
    with EnginePool(EngineConfig(backend="transformers", device="cpu"), sharp_models[0]) as pool:
        report = sample_pairs(sharp_models[0], task, sampling, pool, scorer, out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == report["pairs"] > 0 and report["scorer"] == {"reward_model": str(exported)}
    for row in rows:
        for side in ("chosen", "rejected"):
            found = score(exported, [row["prompt"]], [row[side][0]["content"]], template="chat")
            assert row[f"score_{side}"] == pytest.approx(found[0], abs=1e-4)
        assert row["score_chosen"] > row["score_rejected"]
