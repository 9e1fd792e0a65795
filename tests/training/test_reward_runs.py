"""Reward models from a recipe: trained through Ray beside other methods, and judge of the same run."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pandas as pd
import pytest
from conftest import SENTENCES
from support.command import nothing_begun, otpo, refused
from support.training import losses, metrics, settings

from otpo.errors import UserError
from otpo.models.reward_model import RewardScorer
from otpo.training.objectives.reward import load_margins
from pipeline.recipe import make_recipe
from pipeline.run.run import RunResult, run
from pipeline.sweep.search import Search, plan
from pipeline.train.launcher import make_job
from pipeline.train.tokens import prepare_tokens

MODELS = {"rm": {"method": "reward-model", "center_rewards_coefficient": 0.01}}


def write_rated(path: Path, n: int = 60, seed: int = 0) -> Path:
    """Pairs whose chosen completion is long and whose rejected one is short, with margins."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choice(SENTENCES).split()[:high][-draw.randint(low, high) :])

    rows = [
        {"prompt": f"Question {i}: {words(2, 4)}", "chosen": words(6, 9), "rejected": words(1, 3), "margin": i % 3 / 2}
        for i in range(n)
    ]
    path.write_text(json.dumps(rows))
    return path


def recipe_of(folder: Path, model: Path, methods: dict, **changes):
    data = {"path": str(write_rated(folder / "rated.json")), "validation": 0.2}
    return make_recipe(settings(folder, model, methods=methods, **{"data": data} | changes))


# ---- what travels to the workers, and what is refused ----


def test_margins_and_the_padding_token_travel_with_reward_models_only(tmp_path, tiny_llama):
    recipe = recipe_of(tmp_path, tiny_llama, {"dpo": {}, "kto": {}, **MODELS})
    tokens = prepare_tokens(
        recipe, tmp_path / "run", model=str(tiny_llama), source=recipe.data.path or "", supervised=False
    )
    dpo, kto, rm = (
        make_job(recipe, tmp_path, label, model=recipe.model, tokens=tokens, caches=tmp_path)
        for label in recipe.methods
    )
    assert rm.margins and load_margins(rm.margins) == {i: i % 3 / 2 for i in range(60)}
    assert rm.score_pad is not None and rm.frozen_models == {} and rm.tokens == dpo.tokens != kto.tokens
    assert dpo.margins is None and dpo.score_pad is None and kto.margins is None
    alone = recipe_of(tmp_path, tiny_llama, {"dpo": {}})
    found = prepare_tokens(
        alone, tmp_path / "run", model=str(tiny_llama), source=recipe.data.path or "", supervised=False
    )
    assert found.margins is None and found.hash == tokens.hash


def test_a_reward_model_answers_nothing_and_is_no_scorer_of_tokens(tmp_path, tiny_llama):
    recipe = recipe_of(tmp_path, tiny_llama, {"dpo": {}, **MODELS}, judge={"reward_model": "rm"})
    assert recipe.labels() == ["base", "dpo"] and recipe.training_order() == ["dpo", "rm"]
    assert (recipe.judge.model, recipe.judge.protocol) == ("rm", "reward")
    with pytest.raises(UserError, match=r"methods\.tgdpo\.oracle: 'rm' is a reward model"):
        recipe_of(tmp_path, tiny_llama, {"tgdpo": {"oracle": "rm"}, **MODELS})


@pytest.mark.parametrize(
    ("judge", "words"),
    [
        ({"reward_model": "dpo"}, ["judge.reward_model", "expected a reward model", "label 'dpo'"]),
        ({"reward_model": "START"}, ["judge.reward_model", "expected a reward model", "LlamaForCausalLM"]),
        ({"reward_model": "rm", "url": "http://127.0.0.1:9/v1"}, ["in place of a judge's url"]),
        ({}, ["judge.url, judge.vllm or judge.reward_model"]),
    ],
)
def test_a_judge_that_cannot_be_is_refused_before_anything_starts(tmp_path, tiny_llama, judge, words):
    (tmp_path / "prompts.json").write_text(json.dumps([{"instruction": "Say something."}]))
    recipe = recipe_of(tmp_path, tiny_llama, {"dpo": {}, **MODELS}, generate={"tasks": ["prompts.json"]})
    tree = recipe.model_dump(mode="json") | {
        "judge": {k: str(tiny_llama) if v == "START" else v for k, v in judge.items()}
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
    refused(otpo(tmp_path, "run", "recipe.yaml"), *words)
    nothing_begun(tmp_path)


def test_a_sweep_of_a_reward_model_needs_no_answers(tmp_path, tiny_llama):
    def planned(metric: str) -> Search:
        sweep = {"params": {"methods.rm.center_rewards_coefficient": [0.0, 0.01]}, "metric": metric}
        return plan(recipe_of(tmp_path, tiny_llama, MODELS, sweep=sweep, train={"eval_every": 2}))[0]

    assert planned("eval_rewards/accuracies").label == "rm"
    with pytest.raises(UserError, match=r"'rm' is a reward model, which writes none: take eval_rewards/accuracies"):
        planned("win_rate")


# ---- through Ray ----

PROMPTS = ["Where is the bicycle?", "What is the capital of Mongolia?", "Is the whale a fish?"]


def run_of(folder: Path, model: Path, workers: int, until: str) -> RunResult:
    (folder / "prompts.json").write_text(json.dumps([{"instruction": prompt} for prompt in PROMPTS]))
    recipe = recipe_of(
        folder, model, {**MODELS, "dpo": {}}, judge={"reward_model": "rm"},
        generate={"tasks": {"small": str(folder / "prompts.json")}, "backend": "transformers", "max_tokens": 8},
        train={"workers": workers, "max_steps": 12, "eval_every": 6, "learning_rate": 3e-3},
    )  # fmt: skip
    return run(recipe, folder / "runs" / str(workers), world=None, progress=lambda *_: None, until=until)


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory, tiny_llama, ray_cluster) -> dict[int, RunResult]:
    """A reward model and DPO, by one worker and by two; the second run goes on to the report."""
    folder = tmp_path_factory.mktemp("rewarded")
    return {n: run_of(folder, tiny_llama, n, until) for n, until in ((1, "train"), (2, "report"))}


@pytest.mark.slow
def test_a_reward_model_learns_through_ray(rewarded):
    label = rewarded[2].folder.label("rm").path
    found, (steps, evaluations) = losses(label), metrics(label)
    start = steps[0]["rewards/margins"]
    assert start == 0 and steps[0]["rewards/accuracies"] == 0 and steps[0]["mean_reward"] == 0
    assert found[0] > math.log(2), "margins ask for more than equal scores"
    assert found[-1] < 0.6 * found[0] and steps[-1]["rewards/accuracies"] > 0.9
    assert evaluations[-1]["eval_rewards/accuracies"] > 0.9


@pytest.mark.slow
def test_two_workers_train_what_one_does(rewarded):
    one, two = (metrics(rewarded[n].folder.label("rm").path) for n in (1, 2))
    for ours, theirs in zip(one[0] + one[1], two[0] + two[1], strict=True):
        timed = {"seconds", "tokens_per_second"}
        assert {k: v for k, v in theirs.items() if k not in timed} == pytest.approx(
            {k: v for k, v in ours.items() if k not in timed}, rel=1e-3, abs=1e-4
        )


@pytest.mark.slow
def test_the_label_judges_the_answers_of_its_run(rewarded):
    this = rewarded[2]
    assert not (this.folder.label("rm").path / "small").exists(), "it writes no outputs"
    base, dpo = (
        [row["output"] for row in json.loads(this.folder.outputs(name, "small").read_text())]
        for name in ("base", "dpo")
    )
    scorer = RewardScorer(this.folder.model("rm"))
    assert str(scorer.template) == "literal", "as the pairs, which are strings, were rendered"
    ours, theirs = scorer(PROMPTS, dpo), scorer(PROMPTS, base)
    expected = [1 + 1 / (1 + math.exp(b - a)) for a, b in zip(ours, theirs, strict=True)]
    verdicts = pd.read_parquet(this.folder.verdicts("small"))
    assert verdicts["preference"].tolist() == pytest.approx(expected, abs=1e-4)
    board = pd.read_csv(this.folder.leaderboard)
    assert board["judge"].tolist() == ["rm"] and board["protocol"].tolist() == ["reward"]
    assert "scored by the reward model rm" in this.folder.report.read_text()
    again = run(this.recipe, this.folder.path, world=None, progress=lambda *_: None)
    assert again.did == []
