"""What methods beside DPO ask of a plan: other rows, further passes, frozen models, steps of another size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from eval.judge.protocols.registry import find_protocol
from jobs.cli import app
from otpo.data.token_file import load_tokens, save_tokens
from otpo.records import TokenCompletion
from pipeline.plan import Lengths, Plan, Shape, gpu_machine, measured, plan, shape_of
from pipeline.plan.serving import serving
from pipeline.plan.speed import forward_flops, frozen_seconds
from pipeline.recipe import load_recipe

MACHINE = gpu_machine("H100", nodes=1, per_node=8)
PAIRS = Lengths(60_000, 2, 190, 350, 3906, 1.4 * 540**2, "somewhere")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("8b")
    AutoConfig.for_model(
        "llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, dtype="bfloat16",
        tie_word_embeddings=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def shape(model: Path) -> Shape:
    return shape_of(model)


def planned(shape: Shape, methods: dict, *overrides: str, lengths: Lengths | None = PAIRS) -> Plan:
    recipe = load_recipe(
        "llama3_8b_otpo",
        [f"model.path={shape.name}", f"methods={json.dumps(methods)}", "train.save_every=null",
         "train.save_minutes=null", *overrides],
    )  # fmt: skip
    return plan(recipe, shape, MACHINE, lengths)


def test_kto_trains_on_each_completion_by_itself(shape: Shape) -> None:
    """Twice as many rows, each of a prompt and one completion, and once more forward over those of other prompts."""
    dpo, kto = planned(shape, {"dpo": {}}), planned(shape, {"kto": {}})
    assert (dpo.steps, kto.steps) == (-(-60_000 // 128), -(-120_000 // 128))
    single = PAIRS.single(both=True)
    assert (single.rows, single.completions, single.longest, kto.lengths) == (120_000, 1, 2048, single)
    passes = 3 + 1 + 1  # forward, twice backward; computed again (`activation_checkpointing`); the first pass
    head = sum(forward_flops(shape, single)) - forward_flops(shape, single)[0]
    expected = 128 / 8 * (passes * sum(forward_flops(shape, single)) - head) / (0.4 * 989e12)
    assert kto.asked.step_seconds == pytest.approx(expected)
    # rows that are labelled already stay as they are
    assert planned(shape, {"kto": {}}, lengths=single).steps == kto.steps


def test_completions_of_other_prompts_are_no_rows(tmp_path: Path) -> None:
    rows = [TokenCompletion(i, [5] * 10, [6] * 20, True, [7] * 90) for i in range(4)]
    save_tokens(tmp_path / "tokens", rows)
    found = measured(load_tokens(tmp_path / "tokens"), "here")
    assert (found.rows, found.completions, found.completion, found.longest) == (4, 1, 20.0, 30)


def test_a_loss_over_the_whole_batch_takes_another_pass(shape: Shape) -> None:
    dpo, aot = (planned(shape, {name: {}}, "train.activation_checkpointing=false") for name in ("dpo", "aot"))
    assert aot.asked.step_seconds == pytest.approx(4 / 3 * dpo.asked.step_seconds)


def test_each_label_has_its_own_steps(shape: Shape) -> None:
    """A label with a quarter of the batch takes four times as many steps, each of a quarter of the time."""
    alone, both = (
        planned(shape, {"dpo": {}}),
        planned(shape, {"dpo": {}, "small": {"method": "dpo", "global_batch_size": 32}}),
    )
    frozen = frozen_seconds(shape, PAIRS, MACHINE, 2) / 3600
    assert both.steps == alone.steps + 1875
    assert both.hours - frozen == pytest.approx(2 * (alone.hours - frozen), rel=0.01)
    assert both.step_seconds == pytest.approx((both.hours - frozen) * 3600 / both.steps)


def test_frozen_models_are_asked_once_each(shape: Shape) -> None:
    one = frozen_seconds(shape, PAIRS, MACHINE, 2) / 3600
    dpo = planned(shape, {"dpo": {}}).hours
    steps = dpo - one
    assert planned(shape, {"simpo": {}}).hours == pytest.approx(steps)  # it has no reference
    assert planned(shape, {"dpo": {}, "ipo": {}}).hours == pytest.approx(2 * steps + one)
    assert planned(shape, {"dpo": {}, "tgdpo": {"oracle": "dpo"}}).hours == pytest.approx(2 * steps + 2 * one)
    tis = {"dpo": {}, "not": {"method": "dpo", "swap_answers": True},
           "tis-dpo": {"positive": "dpo", "negative": "not"}}  # fmt: skip
    assert planned(shape, tis).hours == pytest.approx(3 * steps + 3 * one)
    # KTO asks about completions and about those of other prompts
    kto, single = planned(shape, {"kto": {}}), PAIRS.single(both=True)
    asked = frozen_seconds(shape, replace(single, completions=2), MACHINE, 2) / 3600
    assert kto.hours == pytest.approx(kto.steps * kto.asked.step_seconds / 3600 + asked)


def test_a_reward_model_has_one_score_in_place_of_the_vocabulary(shape: Shape) -> None:
    made = planned(shape, {"reward-model": {}}, "train.activation_checkpointing=false")
    decoder = forward_flops(shape, PAIRS)[0]
    assert made.asked.step_seconds == pytest.approx(128 / 8 * 3 * decoder / (0.4 * 989e12))
    assert made.export_bytes == 2 * (shape.parameters - shape.head)


def test_sampled_pairs_are_as_many_as_their_prompts_give(shape: Shape, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"instruction": "q"}\n' * 100)
    sampled = f"pairs={{prompts: {tmp_path}/prompts.jsonl, per_prompt: 2, max_tokens: 64}}"
    made = planned(shape, {"dpo": {}}, sampled, "data.path=null", "data.validation=0", "train.eval_every=null",
                   lengths=None)  # fmt: skip
    assert made.lengths.rows == 200 and made.lengths.completion == 64 and made.steps == 2
    assert "200 pairs sampled for 100 prompts" in made.assumptions[0]


def shown(model: Path, *words: str) -> str:
    return CliRunner().invoke(app, ["plan", "llama3_8b_otpo", f"model.path={model}", "--gpu", "H100", *words]).output


def test_an_engine_that_cannot_share_the_model_is_told(model: Path) -> None:
    said = shown(model, "generate.tensor_parallel_size=3", "--gpus-per-node", "8")
    assert "3 GPUs of an engine (generate.tensor_parallel_size) cannot share the model evenly: set 1" in said


def test_each_judge_of_a_panel_is_paid_for_each_of_its_samples(shape: Shape) -> None:
    def judged(**judge):
        recipe = load_recipe("llama3_8b_otpo", [f"judge.{key}={json.dumps(value)}" for key, value in judge.items()])
        found = serving(recipe, shape, MACHINE)
        return found.calls, found.usd

    calls, usd = judged()
    assert judged(samples=3, temperature=1.0) == (3 * calls, pytest.approx(3 * usd))
    dearer = {"model": "other", "price_input": 20, "price_output": 60}
    assert judged(panel=[dearer]) == (2 * calls, pytest.approx(3 * usd))
    # one output at a time: prompts are shorter by the other, and replies as long as the protocol lets them be
    rated, paid = judged(protocol="rating")
    tokens = find_protocol("rating").max_tokens
    assert paid == pytest.approx(rated * ((1200 - 400) * 10 + tokens * 30) / 1e6)


def test_rows_are_no_longer_than_the_model_has_positions(model: Path) -> None:
    assert "the longest cut at 8192" in shown(model, "data.max_length=20000")
    assert "the longest cut at 2048" in shown(model)
