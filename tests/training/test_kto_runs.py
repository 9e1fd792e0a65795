"""KTO from a recipe: what data it takes, beside pair methods on the same file, and through Ray on labelled rows."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import SENTENCES
from support.command import nothing_begun, otpo, refused
from support.training import losses, metrics, pairs_of, settings
from transformers import AutoModelForCausalLM

from otpo.data.token_file import load_tokens
from otpo.data.unpaired import collate_unpaired, split_pairs
from otpo.errors import UserError
from otpo.models.policy import PolicyModel
from otpo.records import TokenCompletion
from otpo.training.objectives.unpaired import unpaired_losses
from otpo.training.step import evaluate
from pipeline.recipe import dump_yaml, make_recipe
from pipeline.run.run import RunResult, run
from pipeline.train.frozen_cache import FrozenLogProbs
from pipeline.train.launcher import make_job
from pipeline.train.tokens import Tokens, prepare_tokens


def write_labelled(path: Path, n: int = 60, seed: int = 0) -> Path:
    """Rows of which two in three are good: long completions, the bad ones short."""
    draw = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(draw.choice(SENTENCES).split()[: draw.randint(low, high)])

    rows = [
        {
            "prompt": f"Question {i % (n - 4)}: {words(2, 6)}",
            "completion": f" {words(5, 9) if i % 3 else words(1, 3)}",
            "label": bool(i % 3),
        }
        for i in range(n)
    ]
    path.write_text(json.dumps(rows))
    return path


def prepared(folder: Path, model: Path, methods: dict, **changes) -> Tokens:
    recipe = make_recipe(settings(folder, model, methods=methods, **changes))
    source = recipe.data.path
    assert source
    return prepare_tokens(recipe, folder / "run", model=str(model), source=source, supervised=False)


def completions_of(tokens: str | None) -> list[TokenCompletion]:
    assert tokens
    return [item for item in load_tokens(tokens) if isinstance(item, TokenCompletion)]


# ---- the token ids ----


def test_pairs_become_completions_with_the_same_prompts_held_out(tmp_path, tiny_llama):
    tokens = prepared(tmp_path, tiny_llama, {"dpo": {}, "kto": {}})
    assert tokens.unpaired and tokens.unpaired.hash != tokens.hash
    assert tokens.unpaired.n_train == 2 * tokens.n_train == len(completions_of(tokens.unpaired.train))
    for pairs, side in ((tokens.train, tokens.unpaired.train), (tokens.validation, tokens.unpaired.validation)):
        assert pairs
        split, found = split_pairs(pairs_of(pairs)), completions_of(side)
        assert [(i.row, i.prompt_ids, i.completion_ids, i.label) for i in found] == [
            (i.row, i.prompt_ids, i.completion_ids, i.label) for i in split
        ]
        completions = {(tuple(i.prompt_ids), tuple(i.completion_ids)) for i in split}
        texts = {completion for _, completion in completions}
        for item in found:
            assert item.mismatched_ids and tuple(item.mismatched_ids) in texts, "of the same side of the split"


def test_without_kto_there_is_one_set_of_token_ids_and_it_is_the_same(tmp_path, tiny_llama):
    alone, beside = (prepared(tmp_path, tiny_llama, methods) for methods in ({"dpo": {}}, {"dpo": {}, "kto": {}}))
    assert alone.unpaired is None and alone.hash == beside.hash and alone.train == beside.train


def test_labelled_rows_are_taken_as_they_are(tmp_path, tiny_llama):
    data = {"path": str(write_labelled(tmp_path / "kto.json")), "validation": 0.2, "max_length": 40}
    tokens = prepared(tmp_path, tiny_llama, {"kto": {}}, data=data)
    train, held = completions_of(tokens.train), completions_of(tokens.validation)
    assert tokens.n_train == len(train) and len(train) + len(held) == 60 and 8 <= len(held) <= 12
    rows = json.loads((tmp_path / "kto.json").read_text())
    for item in train + held:
        assert item.label == rows[item.row]["label"] and item.mismatched_ids
        assert len(item.prompt_ids) + len(item.mismatched_ids) <= 40
    assert not {tuple(i.prompt_ids) for i in train} & {tuple(i.prompt_ids) for i in held}
    assert tokens.report.labels == {"true": 40, "false": 20}


def test_each_job_has_the_rows_that_its_method_takes(tmp_path, tiny_llama):
    methods = {"dpo": {}, "kto": {}, "kto-strong": {"method": "kto", "beta": 0.5}}
    recipe = make_recipe(settings(tmp_path, tiny_llama, methods=methods, train={"max_steps": None, "epochs": 2}))
    tokens = prepare_tokens(
        recipe, tmp_path / "run", model=str(tiny_llama), source=str(tmp_path / "pairs.json"), supervised=False
    )
    dpo, kto, strong = (
        make_job(recipe, tmp_path, label, model=recipe.model, tokens=tokens, caches=tmp_path) for label in methods
    )
    assert isinstance(load_tokens(dpo.tokens)[0], type(pairs_of(dpo.tokens)[0]))
    assert kto.tokens == strong.tokens != dpo.tokens and kto.tokens_hash == strong.tokens_hash != dpo.tokens_hash
    assert (dpo.total_steps, kto.total_steps) == (12, 24), "an epoch is all completions: 48 pairs, 8 a step"
    only_pairs = prepared(tmp_path, tiny_llama, {"dpo": {}})
    with pytest.raises(UserError, match=r"methods\.kto: KTO needs labelled completions"):
        make_job(recipe, tmp_path, "kto", model=recipe.model, tokens=only_pairs, caches=tmp_path)


# ---- what is refused ----


def test_a_pair_method_refuses_labelled_rows_before_anything_starts(tmp_path, tiny_llama):
    data = {"path": str(write_labelled(tmp_path / "kto.json"))}
    recipe = make_recipe(settings(tmp_path, tiny_llama, methods={"kto": {}, "simpo": {}}, data=data))
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    done = otpo(tmp_path, "train", tmp_path / "recipe.yaml")
    refused(done, "methods.simpo", "needs preference pairs", "chosen, rejected", "kto.json", "method: kto")
    nothing_begun(tmp_path)


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        (
            [{"prompt": "a", "completion": "b"}] * 3,
            {},
            ["methods.kto", "needs completions with a label", "Add `label`"],
        ),
        ([{"prompt": "a", "completion": c, "label": c < "m"} for c in "abyz"], {}, ["at least two prompts", "4 rows"]),
        (
            [{"prompt": str(i // 2), "completion": str(i), "label": True} for i in range(20)],
            {"validation": 2},
            ["2 rows of 1", "raise data.validation"],
        ),
        ([{"prompt": "a", "completion": "b", "label": "maybe"}] * 3, {}, ["label is neither true nor false"]),
    ],
)
def test_rows_that_kto_cannot_take_are_refused(tmp_path, tiny_llama, rows, changes, words):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = {"path": str(tmp_path / "rows.json"), "validation": 0} | changes
    with pytest.raises(UserError) as error:
        prepared(tmp_path, tiny_llama, {"kto": {}}, data=data)
    assert all(word in str(error.value) for word in words), error.value


def test_a_best_metric_that_kto_lacks_is_refused(tmp_path, tiny_llama):
    train = {"eval_every": 1, "best_metric": "eval_rewards/accuracies", "best_mode": "max"}
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {}, "kto": {}}, train=train)
    with pytest.raises(UserError, match=r"train\.best_metric: an evaluation of 'kto'.*eval_rewards/margins"):
        run(make_recipe(tree), tmp_path / "run", until="train")


# ---- through Ray ----


def trained_on_labels(folder: Path, model: Path, **train) -> RunResult:
    data = {"path": str(folder / "kto.json"), "validation": 0.2}
    train = {"max_steps": 8, "eval_every": 4, "learning_rate": 3e-3, "best_metric": "eval_loss"} | train
    methods = {"kto": {"save_every": 3}, "one-by-one": {"method": "kto", "micro_batch_size": 1}}
    recipe = make_recipe(settings(folder, model, methods=methods, data=data, train=train))
    return run(recipe, folder / "runs" / str(train["workers"]), world=None, progress=lambda *_: None, until="train")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, tiny_llama, ray_cluster) -> dict[int, RunResult]:
    """Labelled rows trained on by one worker and by two."""
    folder = tmp_path_factory.mktemp("labelled")
    write_labelled(folder / "kto.json")
    return {workers: trained_on_labels(folder, tiny_llama, workers=workers) for workers in (1, 2)}


@pytest.mark.slow
def test_labelled_rows_train_and_start_at_one_half(labelled):
    label = labelled[1].folder.label("kto").path
    found, (lines, evaluations) = losses(label), metrics(label)
    assert found[0] == pytest.approx(0.5, abs=1e-5) and found[-1] < 0.47
    assert lines[-1]["rewards/margins"] > 0.1 and lines[-1]["kl"] >= 0 and "rewards/accuracies" not in lines[-1]
    assert [line["step"] for line in evaluations] == [4, 8]
    assert evaluations[-1]["eval_loss"] < 0.5 and evaluations[-1]["eval_rewards/margins"] > 0
    assert lines[-1]["epoch"] == pytest.approx(8 * 8 / 48, abs=0.05)
    assert (label / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_two_workers_and_small_micro_batches_train_what_one_worker_does(labelled):
    whole = metrics(labelled[1].folder.label("kto").path)
    for workers, name in ((2, "kto"), (1, "one-by-one"), (2, "one-by-one")):
        parts = metrics(labelled[workers].folder.label(name).path)
        for ours, theirs in zip(whole[0] + whole[1], parts[0] + parts[1], strict=True):
            timed = {"seconds", "tokens_per_second"}
            assert {k: v for k, v in theirs.items() if k not in timed} == pytest.approx(
                {k: v for k, v in ours.items() if k not in timed}, rel=1e-4, abs=1e-5
            )


@pytest.mark.slow
def test_an_evaluation_is_that_of_the_exported_model(labelled, tiny_llama):
    this = labelled[2]
    tokens = prepare_tokens(
        this.recipe, this.folder.path, model=str(tiny_llama), source=this.recipe.data.path or "", supervised=False
    )
    policy, start = (
        PolicyModel(AutoModelForCausalLM.from_pretrained(path)).eval()
        for path in (this.folder.model("kto"), tiny_llama)
    )

    @torch.no_grad()
    def reference(batch):
        return start(batch)[0], start(batch.mismatched)[0]

    items = completions_of(tokens.validation)
    found = evaluate(
        [collate_unpaired(items)], unpaired_losses(policy, this.recipe.method("kto"), reference), denominator=len(items)
    )
    logged = min(metrics(this.folder.label("kto").path)[1], key=lambda line: line["eval_loss"])
    assert {"step": logged["step"]} | found == pytest.approx(logged, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_the_reference_is_scored_once_for_all_workers_and_labels(labelled):
    (folder,) = labelled[1].folder.frozen_caches.iterdir()
    cache = FrozenLogProbs(folder)
    assert len(cache.rows) == 60 and len(list(folder.glob("part-*"))) == 1, "the second run computed nothing"
