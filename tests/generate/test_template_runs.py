"""A run renders prompts in one way: what generation sends to a model is what training showed it."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from support.command import nothing_begun, otpo, refused
from support.training import pairs_of, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from otpo.data.encoder import encode_prompt
from otpo.data.template import trained_with
from otpo.models.reward_model import RewardScorer
from pipeline.generate.engine import stop_tokens
from pipeline.generate.model_folder import open_model
from pipeline.recipe import make_recipe
from pipeline.run.run import RunResult, run

MESSAGES = {
    "prompt": [{"role": "user", "content": "Where is it?"}],
    "chosen": [{"role": "assistant", "content": "Here, as always."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}


def recipe_tree(folder: Path, model: Path, **changes) -> dict:
    """Two methods on strings; the prompts of the task are those of the pairs."""
    tree = settings(folder, model, methods={"dpo": {}, "rm": {"method": "reward-model"}}, judge={"reward_model": "rm"})
    rows = json.loads((folder / "pairs.json").read_text())
    (folder / "prompts.json").write_text(json.dumps([{"instruction": row["prompt"]} for row in rows]))
    generate = {"tasks": {"small": str(folder / "prompts.json")}, "backend": "transformers", "max_tokens": 8}
    train = tree["train"] | {"workers": 1, "max_steps": 3, "learning_rate": 1e-4}
    return tree | {"generate": generate, "train": train} | changes


# ---- refused before anything starts ----


def written(folder: Path, tree: dict) -> Path:
    (folder / "recipe.yaml").write_text(json.dumps(tree))
    return folder


@pytest.mark.parametrize(
    ("data", "generate", "words"),
    [
        ("auto", "chat", ["generate.template=chat", "data.path is trained as literal", "set data.template"]),
        pytest.param(
            "chat", "literal", ["generate.template=literal", "data.path is trained as chat"], marks=pytest.mark.slow
        ),
    ],
)
def test_generation_that_would_render_otherwise_than_training_is_refused(tmp_path, tiny_llama, data, generate, words):
    tree = recipe_tree(tmp_path, tiny_llama)
    tree["data"]["template"], tree["generate"]["template"] = data, generate
    refused(otpo(written(tmp_path, tree), "run", "recipe.yaml"), "render prompts as training does", *words)
    nothing_begun(tmp_path)


@pytest.mark.slow
def test_base_rows_and_pairs_of_two_templates_are_refused(tmp_path, tiny_llama):
    row = {"prompt": MESSAGES["prompt"], "completion": MESSAGES["chosen"]}
    (tmp_path / "base.json").write_text(json.dumps([row] * 8))
    tree = recipe_tree(tmp_path, tiny_llama, base={"data": str(tmp_path / "base.json"), "max_steps": 1})
    done = otpo(written(tmp_path, tree), "train", "recipe.yaml")
    refused(done, "rendered alike", "base.data chat", "data.path literal", "data.template=chat")
    nothing_begun(tmp_path)


def test_rows_of_both_kinds_are_said_and_not_generated_from(tmp_path, tiny_llama):
    tree = recipe_tree(tmp_path, tiny_llama)
    strings = json.loads((tmp_path / "pairs.json").read_text())
    (tmp_path / "pairs.json").write_text(json.dumps([MESSAGES, *strings]))
    refused(otpo(written(tmp_path, tree), "run", "recipe.yaml"), "all messages or all strings", "data.template=chat")
    nothing_begun(tmp_path)


@pytest.mark.slow
def test_messages_of_a_task_are_refused_where_training_is_literal(tmp_path, tiny_llama):
    tree = recipe_tree(tmp_path, tiny_llama)
    (tmp_path / "prompts.json").write_text(json.dumps([{"messages": MESSAGES["prompt"]}]))
    refused(otpo(written(tmp_path, tree), "run", "recipe.yaml"), "prompt 0", "template is literal", "list of messages")
    nothing_begun(tmp_path)


# ---- through Ray ----


def run_with(folder: Path, model: Path, template: str) -> tuple[RunResult, list[tuple[str, int, int, str]]]:
    tree = recipe_tree(folder, model)
    tree["data"]["template"] = template
    seen: list[tuple[str, int, int, str]] = []
    done = run(make_recipe(tree), folder / "runs" / template, progress=lambda *step: seen.append(step))
    return done, seen


def greedy(network: torch.nn.Module, tokenizer, prompt: list[int], stops: list[int], length: int) -> str | None:
    """The greedy continuation of token ids by plain forward passes; None where two tokens are nearly tied."""
    ids = list(prompt)
    with torch.inference_mode():
        while len(ids) < len(prompt) + length:
            best = network(torch.tensor([ids])).logits[0, -1].topk(2)
            if best.values[0] - best.values[1] < 1e-3:
                return None
            ids.append(int(best.indices[0]))
            if ids[-1] in stops:
                break
    return tokenizer.decode([token for token in ids[len(prompt) :] if token not in stops], skip_special_tokens=True)


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "template"), [("auto", "literal"), ("chat", "chat")])
def test_strings_are_generated_from_and_scored_through_the_template_they_were_trained_with(
    tmp_path, sharp_models, ray_cluster, setting, template
):
    done, seen = run_with(tmp_path, sharp_models[0], setting)
    other = {"literal": "chat", "chat": "literal"}[template]
    dpo, rm = done.folder.model("dpo"), done.folder.model("rm")
    tokens = done.folder.manifest.read_text()
    trained = {pair.row: pair.prompt_ids for pair in pairs_of(json.loads(tokens)["stages"]["train/dpo"]["tokens"])}
    rows = json.loads(done.folder.outputs("dpo", "small").read_text())

    # the ids of generation are those of training
    tokenizer = AutoTokenizer.from_pretrained(dpo)
    said = json.loads(done.folder.outputs("dpo", "small").with_name("generation.json").read_text())
    assert said["template"] == trained_with(dpo) == trained_with(rm) == template
    for number, ids in trained.items():
        assert encode_prompt(tokenizer, rows[number]["instruction"], template) == ids
        assert encode_prompt(tokenizer, rows[number]["instruction"], other) != ids

    # and the outputs are the continuations of exactly these ids
    network = AutoModelForCausalLM.from_pretrained(dpo, dtype=torch.float32).eval()
    stops = stop_tokens(open_model(dpo), tokenizer)
    expected = {number: greedy(network, tokenizer, ids, stops, 8) for number, ids in list(trained.items())[:12]}
    sure = {number: text for number, text in expected.items() if text is not None}
    assert len(sure) > 6 and {number: rows[number]["output"] for number in sure} == sure

    # the reward model of the run scored what it was trained on
    prompts, outputs = [row["instruction"] for row in rows], [row["output"] for row in rows]
    base = [row["output"] for row in json.loads(done.folder.outputs("base", "small").read_text())]
    verdicts = pd.read_parquet(done.folder.verdicts("small"))
    scores = [json.loads(raw)["score"] if isinstance(raw, str) else None for raw in verdicts["raw"]]
    ours, theirs = (RewardScorer(rm, template=name)(prompts, outputs) for name in (template, other))
    compared = [i for i in range(len(rows)) if outputs[i] != base[i]]
    assert compared and [scores[i] for i in compared] == pytest.approx([ours[i] for i in compared], abs=1e-4)
    assert [ours[i] for i in compared] != pytest.approx([theirs[i] for i in compared], abs=1e-4)

    # the first prompt of each is shown, special tokens visible
    remarks = {what: remark for what, _, total, remark in seen if not total}
    assert remarks["template"].startswith(f"{template}: ")
    first = remarks["first prompt of small"]
    assert first == remarks["first training prompt of pairs.json"] and "<|bos|>" in first
    assert ("<|im_start|>" in first) == (template == "chat")
