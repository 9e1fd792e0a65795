"""Reward models that were trained: exported, used as scorers of texts and in a judge's place."""

from __future__ import annotations

import json
import math
import shutil

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import otpo, refused
from support.reward import export_reward_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from eval.judge.config import JudgeConfig
from eval.judge.reward_scores import judge_by_scores
from eval.judge.table import COLUMNS, ledger
from eval.stats.win_rate import by_prompt
from eval.tasks import Prompt, Task
from otpo.errors import UserError
from otpo.models.disk.reward_tokenizer import pad_token
from otpo.models.reward_model import RewardScorer
from pipeline.generate.engine import EngineConfig, Sampling
from pipeline.generate.pairs import sample_pairs
from pipeline.generate.pool import EnginePool
from pipeline.judge.reward_model import RewardJudge, check_reward_model


@pytest.fixture(scope="module")
def exported(tiny_llama, tmp_path_factory):
    return export_reward_model(tiny_llama, tmp_path_factory.mktemp("reward"))


def score(folder, prompts, completions, template="auto") -> list[float]:
    return RewardScorer(folder, template=template)(prompts, completions)


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
    assert score(exported, messages, COMPLETIONS) == pytest.approx(found, abs=1e-5)
    assert score(exported, messages, COMPLETIONS, template="chat") == pytest.approx(found, abs=1e-5)
    with pytest.raises(UserError, match="expected strings, because the template is literal"):
        score(exported, messages, COMPLETIONS, template="literal")
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
    kept = tmp_path / "kept"
    begun = otpo(tmp_path, "board", "init", kept, *files[1:3], "--reward-model", exported, "--task", "small")
    assert begun.code == 0, begun.err
    for words in (["add", kept, files[0]], ["update", kept], ["build", kept]):
        done = otpo(tmp_path, "board", *words)
        assert done.code == 0, done.err
        pd.testing.assert_frame_equal(*(pd.read_csv(tmp_path / n / "leaderboard.csv") for n in ("board", "kept")))
        assert words[0] == "add" or "torch" not in done.loaded  # nothing is scored again


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


def test_what_is_no_whole_reward_model_is_refused_before_anything_is_trained(exported, tmp_path):
    def broken(name, change):
        folder = shutil.copytree(exported, tmp_path / name)
        change(folder)
        with pytest.raises(UserError) as error:
            check_reward_model("judge.reward_model", str(folder))
        return str(error.value)

    def two_labels(folder):
        weights = load_file(folder / "model.safetensors")
        head = weights["score.weight"]
        save_file(weights | {"score.weight": torch.cat([head, head])}, folder / "model.safetensors", {"format": "pt"})

    def cut(folder):
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[:-100])

    check_reward_model("judge.reward_model", str(exported))
    assert "found a classifier of 2" in broken("two", two_labels)
    assert "and its header names" in broken("cut", cut)
    assert "expected an object in the config.json" in broken("list", lambda it: (it / "config.json").write_text("[]"))
    assert "merge it" in broken("adapter", lambda it: (it / "adapter_config.json").write_text("{}"))


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
