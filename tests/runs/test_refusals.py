"""What is refused before the first step: settings that learn nothing from the rows, and GPUs that are not there."""

from __future__ import annotations

import json

import pytest
import torch
from support.training import settings, write_pairs

from otpo.errors import UserError
from otpo.training.schedule import learning_rate, rows_in_step, total_steps
from pipeline.cluster.placement import TrainingRoom
from pipeline.recipe import TrainConfig, make_recipe
from pipeline.run.manifest import enter_recipe, open_run
from pipeline.run.run import run
from pipeline.train.steps import check_steps, small_data


@pytest.mark.parametrize(
    ("rows", "train", "words"),
    [
        (100, {}, ["1 step (train.global_batch_size is 128, and there are 100 rows)", "learning rate is 0"]),
        (1, {"epochs": 3}, ["there are 1 rows", "train.warmup_ratio=0"]),
        (1000, {"max_steps": 1}, ["1 step", "nothing would be learned"]),
        (1000, {"epochs": 1e-4}, ["not one row", "train.max_steps"]),
        (100, {"warmup_ratio": 0}, []),
        (100, {"epochs": 3}, []),
        (1000, {"max_steps": 2}, []),
        (1, {"max_steps": 20}, []),
    ],
)
def test_settings_that_learn_nothing(rows, train, words):
    train = TrainConfig(**train)
    size = train.global_batch_size
    steps = total_steps(rows, global_batch_size=size, max_steps=train.max_steps, epochs=train.epochs)
    learned = sum(
        learning_rate(n, steps, 1.0, scheduler=train.lr_scheduler, warmup_ratio=train.warmup_ratio)
        * rows_in_step(n, rows, global_batch_size=size, max_steps=train.max_steps, epochs=train.epochs)
        for n in range(steps)
    )
    if not words:
        assert learned > 0
        return check_steps("dpo", rows, train)
    assert learned == 0, "what is refused would have trained"
    with pytest.raises(UserError) as error:
        check_steps("dpo", rows, train)
    for word in ("methods.dpo: ", *words):
        assert word in str(error.value), str(error.value)


def test_a_batch_larger_than_the_data_is_told():
    assert "128, and there are 100 rows" in (small_data(100, TrainConfig()) or "")
    assert small_data(128, TrainConfig()) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"max_steps": None, "global_batch_size": 128}}, ["methods.dpo", "learning rate is 0"]),
        ({"data": {"validation": 0.01}}, ["cannot split", "Set data.validation", "to 0 to hold none out"]),
        ({"data": {"validation": 0}, "train": {"eval_every": 2}}, ["train.eval_every", "data.validation above 0"]),
        ({"train": {"eval_every": 2, "best_metric": "eval_los"}}, ["train.best_metric", "did you mean 'eval_loss'"]),
        ({"data": {"split": "test"}}, ["data.split", "is a file, of which all rows are read", "split 'test' alone"]),
    ],
    ids=["one step", "no validation rows", "nothing to evaluate", "no such figure", "a split of a file"],
)
def test_a_run_is_refused_before_anything_starts(tmp_path, tiny_llama, changes, words):
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {}})
    write_pairs(tmp_path / "pairs.json", n=20)
    for section, values in changes.items():
        tree[section] = tree[section] | values
    with pytest.raises(UserError) as error:
        run(make_recipe(tree), tmp_path / "runs" / "small", until="train")
    for word in words:
        assert word in str(error.value), str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_recipe_that_names_nothing_to_train_is_not_done_already(tmp_path, tiny_llama):
    tree = settings(tmp_path, tiny_llama, methods={})
    for until in ("train", "report"):
        with pytest.raises(UserError, match=r"methods is empty\. Name what to train in it"):
            run(make_recipe(tree), tmp_path / "runs" / "small", until=until)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ({"sepo": {"oracle": "START"}}, "methods.sepo: oracle and reference are one model"),
        ({"dpo": {}, "tis-dpo": {"positive": "dpo", "negative": "dpo"}}, "positive and negative are one model, dpo"),
    ],
)
def test_frozen_models_that_are_one_are_refused(tmp_path, tiny_llama, methods, words):
    """Their log-ratio is 0 for every token: which tokens count would be decided by ties."""
    named = {
        label: {key: value.replace("START", str(tiny_llama)) for key, value in keys.items()}
        for label, keys in methods.items()
    }
    with pytest.raises(UserError, match=words):
        run(make_recipe(settings(tmp_path, tiny_llama, methods=named)), tmp_path / "runs" / "small", until="train")


def test_engines_of_sampled_pairs_are_looked_at_before_a_base_is_trained(tmp_path, tiny_llama):
    (tmp_path / "prompts.jsonl").write_text('{"instruction": "What is this?"}\n')
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {}}, data={"validation": 0.2})
    tree["base"] = {"data": str(tmp_path / "pairs.json"), "max_steps": 5}
    tree["pairs"] = {
        "prompts": str(tmp_path / "prompts.jsonl"),
        "scorer": {"url": "http://127.0.0.1:9/v1", "model": "m"},
    }
    tree["generate"] = {"backend": "transformers", "tensor_parallel_size": 2}
    with pytest.raises(UserError, match="the transformers engine takes one GPU"):
        run(make_recipe(tree), tmp_path / "runs" / "small", until="train")
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs no C++ compiler")
def test_an_optimizer_that_this_machine_cannot_run_is_refused_before_anything_starts(tmp_path, tiny_llama, monkeypatch):
    """Also that of one label alone."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {"optimizer": "adamw_8bit"}})
    write_pairs(tmp_path / "pairs.json", n=20)
    with pytest.raises(UserError, match=r"train\.optimizer.*(torchao|C\+\+ compiler)"):
        run(make_recipe(tree), tmp_path / "runs" / "small", until="train")


def test_a_refused_redo_leaves_the_folder_to_its_recipe(tmp_path, tiny_llama):
    """The corrected command is then no other recipe."""
    (tmp_path / "task.json").write_text(json.dumps([{"instruction": "Question"}]))
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {}})
    folder = tmp_path / "runs" / "small"
    manifest = open_run(make_recipe(tree), folder, redo=False)
    enter_recipe(make_recipe(tree), manifest)
    manifest.starts("train/dpo", {})
    before = {path: path.read_bytes() for path in folder.iterdir()}
    refused = make_recipe(tree | {"methods": {"ipo": {}}, "generate": {"tasks": [str(tmp_path / "task.json")]}})
    with pytest.raises(UserError, match=r"judge\.url"):
        run(refused, folder, redo=True)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_gpu_that_is_not_there():
    """No number of workers would help."""
    room = TrainingRoom.of([{"CPU": 8.0}])
    with pytest.raises(UserError) as error:
        room.check(2, use_gpu=True)
    assert "no GPU" in str(error.value) and "Set train.use_gpu=auto or false" in str(error.value)
    assert "train.workers" not in str(error.value)
    assert room.check(2, use_gpu="auto") is False
