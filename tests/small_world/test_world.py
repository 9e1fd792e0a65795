"""The small world: its facts and posts, and the files that a run reads."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from jobs.small_world import world as small_world
from jobs.small_world.prepare import make_tokenizer, prepare
from jobs.small_world.world import ANSWERS, QUESTIONS, STYLES, Item, World, answer, build, read, wrong_filling


@pytest.fixture(scope="module")
def world() -> World:
    return build(seed=3, entities=30, posts=20)


@pytest.fixture(scope="module")
def world_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small_world")
    prepare(folder, seed=3, entities=30, posts=20, base_answers=2)
    return folder


def capital(world: World) -> Item:
    return next(item for item in world.items if item.topic == "capital")


def test_the_same_seed_gives_the_same_world_and_another_seed_another() -> None:
    assert build(5) == build(5)
    assert build(5) != build(6)


def test_facts_are_unambiguous() -> None:
    table = small_world.facts()
    answers = [word for relation in table.values() for word in relation.values()]
    entities = [entity for relation in table.values() for entity in relation]
    assert len(set(answers)) == len(answers) >= 150
    assert len(set(entities)) == len(entities)
    filler = {word for group in (*QUESTIONS.values(), *ANSWERS.values()) for text in group for word in text.split()}
    assert not set(answers) & (set(entities) | {word.strip(".,?:") for word in filler})
    assert table["capital"]["Australia"] == "Canberra" and table["symbol"]["tungsten"] == "W"


def test_no_entity_is_both_trained_and_held_out(world: World) -> None:
    for task in ("facts", "summaries"):
        trained, held_out = ({item.entity for item in world.of(task, split)} for split in ("trained", "held_out"))
        assert trained and held_out and not trained & held_out
    named: dict[str, set[str]] = {"trained": set(), "held_out": set()}
    for item in world.of("summaries"):
        named[item.split] |= {item.truth["thing"], item.decoys["thing"]}
    assert not named["trained"] & named["held_out"]


def test_too_many_entities_are_refused() -> None:
    with pytest.raises(ValueError, match="6 to 190"):
        build(entities=191)


def test_every_answer_of_the_grammar_is_read_as_what_it_says(world: World) -> None:
    rng = random.Random(0)
    for item in world.items:
        for style in STYLES:
            wrong = wrong_filling(item, world.words, rng)
            assert read(answer(item, style, item.truth, rng), item.truth, world.words).right
            reading = read(answer(item, style, wrong, rng), item.truth, world.words)
            assert not reading.right and reading.correct == pytest.approx(1 - 1 / len(item.truth))


def test_naming_the_truth_beside_something_else_is_not_right(world: World) -> None:
    item = capital(world)
    other = wrong_filling(item, world.words, random.Random(0))["capital"]
    both = f"It is {item.truth['capital']} or {other}."
    assert not read(both, item.truth, world.words).right
    assert read("word " * 10, item.truth, world.words).repetition == pytest.approx(7 / 8)
    assert read("", item.truth, world.words).words == 0


def test_prepare_is_deterministic_and_leaves_a_finished_world_alone(world_dir: Path, tmp_path: Path) -> None:
    again = prepare(tmp_path, seed=3, entities=30, posts=20, base_answers=2)
    for name, path in again.items():
        files = sorted(path.iterdir()) if name == "model" else [path]
        for file in files:
            assert file.read_bytes() == (world_dir / file.relative_to(tmp_path)).read_bytes(), file
    before = {path: path.stat().st_mtime_ns for path in again.values()}
    prepare(tmp_path, seed=3, entities=30, posts=20, base_answers=2)
    assert before == {path: path.stat().st_mtime_ns for path in again.values()}
    settings = json.loads((tmp_path / small_world.SETTINGS).read_text())
    assert "length_liking" not in settings, "worlds from before this setting are the same ones"
    prepare(tmp_path, seed=4, entities=30, posts=20, base_answers=2)
    assert again["truth"].read_bytes() != (world_dir / "truth.json").read_bytes()


def test_preference_prompts_hold_no_held_out_entity_and_tasks_hold_both(world_dir: Path) -> None:
    def rows(name: str) -> list[dict]:
        return [json.loads(line) for line in (world_dir / f"{name}.jsonl").read_text().splitlines()]

    world = small_world.load(world_dir / "truth.json")
    held_out = {item.entity for item in world.items if item.split == "held_out"}
    prompts = rows("prompts")
    assert prompts and not held_out & {row["entity"] for row in prompts}
    for task in ("facts", "summaries"):
        assert {row["dataset"] for row in rows(task)} == {"trained", "held_out"}
        assert len({row["id"] for row in rows(task)}) == len(rows(task))
        assert {row["instruction"] for row in rows(task)} <= set(world.truths())


def test_base_data_is_right_and_rambling_as_often_as_asked_and_independently(tmp_path: Path) -> None:
    paths = prepare(tmp_path, seed=0, entities=60, posts=6, right=0.65, rambling=0.3)
    world = small_world.load(paths["truth"])
    truths = world.truths()
    rows = [json.loads(line) for line in paths["base"].read_text().splitlines()]
    found = []
    for row in rows:
        truth = truths.get(row["prompt"][0]["content"])
        if truth:  # posts of the base data are free
            reading = read(row["completion"][0]["content"], truth, world.words)
            found.append((reading.right, reading.words > 15))
    right, rambling = np.array(found, float).T
    tolerance = 4 * 0.5 / math.sqrt(len(found))
    assert right.mean() == pytest.approx(0.65, abs=tolerance)
    assert rambling.mean() == pytest.approx(0.3, abs=tolerance)
    assert abs(np.corrcoef(right, rambling)[0, 1]) < 4 / math.sqrt(len(found))


def test_the_tokenizer_knows_every_word_and_gives_texts_back(world: World) -> None:
    tokenizer = make_tokenizer()
    rng = random.Random(1)
    for item in [*world.items, *(small_world.free_post(rng) for _ in range(50))]:
        for text in [*item.questions(), *(answer(item, style, item.truth, rng) for style in STYLES for _ in range(6))]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids, text
            assert tokenizer.decode(ids) == text
    for word in (word for words in world.words.values() for word in words):
        assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1


def test_a_chat_is_its_prompt_followed_by_its_answer(world_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    from otpo.data.tokens import load_tokenizer, tokenize_completions

    tokenizer = load_tokenizer(world_dir / "model")
    rows = [json.loads(line) for line in (world_dir / "base.jsonl").read_text().splitlines()]
    items, report = tokenize_completions(rows, tokenizer)
    assert len(items) == len(rows) and not report.problems
    for row, item in zip(rows, items, strict=True):
        assert item.completion_ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(item.completion_ids[:-1]) == row["completion"][0]["content"]
        assert item.prompt_ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in item.prompt_ids[1:]
    model = AutoModelForCausalLM.from_pretrained(world_dir / "model")
    assert model.config.vocab_size == len(tokenizer) and not model.config.tie_word_embeddings
    assert model.config.head_dim in (32, 64), "what vLLM's CPU attention takes"
