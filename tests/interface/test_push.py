"""`otpo push` against a stand-in of the hub: what arrives, what is refused, and that nothing leaks."""

from __future__ import annotations

import getpass
import itertools
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import yaml
from support.command import Done, otpo, refused
from support.hub import SIGNATURE, Hub, Request
from support.training import settings, write_pairs

from eval.board.leaderboard import COLUMNS, write_leaderboard
from otpo.errors import UserError
from pipeline.hub.card import without_paths
from pipeline.hub.push import Target, push
from pipeline.recipe import Recipe, make_recipe
from pipeline.run.folder import RunFolder
from pipeline.run.manifest import enter_recipe, open_run
from pipeline.train.model_card import model_card
from pipeline.train.tokens import prepare_tokens

TOKEN = "hf_a_token_of_the_test_" + "x" * 20
START, DATA, MORE = "someone/small-chat", "someone/pairs", "another/pairs"


@pytest.fixture
def hub():
    with Hub(TOKEN) as server:
        yield server


def board(label: str) -> pd.DataFrame:
    row = dict.fromkeys(COLUMNS) | {
        "name": label, "win_rate": 61.25, "win_rate_low": 55.0, "win_rate_high": 67.5, "n_total": 240,
        "length_adjusted_winrate": 58.1, "length_adjusted_low": 51.0, "length_adjusted_high": 65.2,
        "avg_length": 812, "length_ratio": 1.07, "task": "mine", "judge": "/home/anna/judges/my-judge",
        "protocol": "preference", "reference": "base",
    }  # fmt: skip
    return pd.DataFrame([row, row | {"name": "other", "win_rate": 11.1}], columns=list(COLUMNS))


def finish(run: RunFolder, recipe: Recipe, label: str, model: Path, *, start: str, source: str) -> None:
    """What training leaves for a label, with the card that training writes."""
    tokens = prepare_tokens(recipe, run.path, model=str(model), source=str(recipe.data.path), supervised=False)
    spec = None if label == "base" else recipe.method(label)
    card = model_card(
        recipe,
        label,
        start=start,
        train=recipe.train_of(label),
        spec=spec,
        report=replace(tokens.report, source=source),
    )
    shutil.copytree(model, run.model(label))
    (run.model(label) / "README.md").write_text(card)
    (run.model(label) / "otpo.json").write_text('{"template": "chat"}')
    lines = [{"step": 20, "loss": 0.5}, {"step": 20, "eval_loss": 0.61, "eval_rewards/accuracies": 0.75}]
    run.label(label).metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = open_run(recipe, run.path, redo=True)
    enter_recipe(recipe, manifest)
    stage = "base" if label == "base" else f"train/{label}"
    manifest.starts(stage, label)
    with manifest.doing(stage, label, [run.model(label)]):
        pass


@pytest.fixture
def finished(tmp_path, tiny_llama) -> RunFolder:
    """A run that trained `dpo` from a hub model on hub data, and has `otpo` and `rest` still to train."""
    run = RunFolder(tmp_path / "runs" / "small")
    run.path.mkdir(parents=True)
    write_pairs(tmp_path / "pairs.json")
    methods = {"dpo": {"beta": 0.2}, "otpo": {}, "rest": {"method": "ipo"}}
    recipe = make_recipe(settings(tmp_path, tiny_llama, methods=methods))
    mix = f"{DATA}, {tmp_path / 'pairs.json'}, {MORE}"
    finish(run, recipe, "dpo", tiny_llama, start=START, source=mix)
    run.model("otpo").mkdir(parents=True)  # begun, and killed while it was exported
    write_leaderboard(board("dpo"), run.leaderboard)
    return run


def pushes(folder: Path, hub: Hub, *words: object, token: str | None = TOKEN) -> Done:
    """The command in a process of its own, against the stand-in."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "hf"), "HF_TOKEN": ""}
    return otpo(folder, "push", *words, **environment | ({"HF_TOKEN": token} if token else {}))


def leaks_nothing(done: Done, hub: Hub, folder: Path) -> None:
    """The token is in the headers of the hub's own interface and nowhere else."""
    assert TOKEN not in done.out + done.err and SIGNATURE not in done.out + done.err
    for request in hub.requests:
        assert TOKEN not in request.path + request.query and TOKEN.encode() not in request.body
        if request.method == "PUT":
            assert request.authorization is None, "the storage is another party"
    for path in folder.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


def test_what_arrives_is_the_folder_and_a_card(tmp_path, finished, hub):
    model = finished.model("dpo")
    (model / ".cache.partial").write_text("half")
    (model / "secret.txt").symlink_to(tmp_path / "pairs.json")
    (model / "checkpoints").mkdir()
    (model / "checkpoints" / "state.json").write_text("{}")
    done = pushes(tmp_path, hub, "runs/small", "dpo", "--to", "anna/my-dpo", "--license", "apache-2.0")
    assert done.code == 0, done.err
    repository = hub.repositories["anna/my-dpo"]
    assert repository.private and len(repository.commits) == 1
    assert f"{hub.url}/anna/my-dpo/commit/{repository.commits[0]}" in done.out
    there = repository.branches["main"]
    local = {p.name: p.read_bytes() for p in model.iterdir() if p.is_file() and p.name[0] != "." and not p.is_symlink()}
    assert there.keys() == local.keys() and {"model.safetensors", "otpo.json"} <= there.keys()
    assert {name for name in there if there[name] != local[name]} == {"README.md"}
    leaks_nothing(done, hub, tmp_path)

    _, front, text = there["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0", "library_name": "transformers", "pipeline_tag": "text-generation",
        "base_model": START, "base_model_relation": "finetune", "datasets": [DATA, MORE],
        "tags": ["otpo", "preference-optimization", "dpo"],
    }  # fmt: skip
    for word in (
        "# my-dpo", "[DPO](https://arxiv.org/abs/2305.18290)", f"https://huggingface.co/{START}",
        f"[{DATA}](https://huggingface.co/datasets/{DATA})",
        f"(https://huggingface.co/datasets/{MORE}), a local file, 60 of 60 rows used", '"beta": 0.2',
        "after step 20: eval_loss 0.6100",
        "| mine | my-judge (preference) | base | 61.2 [55.0, 67.5] | 58.1 [51.0, 65.2] | 812.0 | 1.07 | 240 |",
    ):  # fmt: skip
        assert word in text, text
    assert "11.1" not in text, "another label's row"


def test_a_card_names_no_local_path_and_no_user(tmp_path, tiny_llama, hub):
    run = RunFolder(tmp_path / "runs" / "small")
    run.path.mkdir(parents=True)
    write_pairs(tmp_path / "pairs.json")
    tree = settings(tmp_path, tiny_llama, methods={"rm": {"method": "reward-model"}, "dpo": {}})
    tree["model"]["lora"] = None
    recipe = make_recipe(tree)
    source = f"{tmp_path / 'pairs.json'}, /home/anna/a, b/secret.jsonl"
    for label in ("rm", "dpo"):
        finish(run, recipe, label, tiny_llama, start=str(tiny_llama), source=source)
    write_leaderboard(board("dpo"), run.leaderboard)
    run.label("dpo").adapter.mkdir()
    config = {"base_model_name_or_path": str(tiny_llama), "r": 8, "peft_type": "LORA"}
    (run.label("dpo").adapter / "adapter_config.json").write_text(json.dumps(config))
    (run.label("dpo").adapter / "adapter_model.safetensors").write_bytes(b"weights")
    for words in (["rm", "--to", "anna/rm"], ["dpo", "--to", "anna/dpo"], ["dpo", "--to", "anna/lora", "--adapter"]):
        done = pushes(tmp_path, hub, "runs/small", *words)
        assert done.code == 0, done.err
        there = hub.repositories[words[2]].branches["main"]
        for name, content in there.items():
            for secret in (str(tmp_path), str(tiny_llama), str(Path.home()), f"/{getpass.getuser()}/", "secret.jsonl"):
                assert len(secret) < 4 or secret.encode() not in content, f"{name}: {secret}"
        card = there["README.md"].decode()
        assert (
            "base_model:" not in card
            and "datasets:" not in card
            and "a local folder" in card
            and "a local file" in card
        )
    assert "AutoModelForSequenceClassification" in hub.repositories["anna/rm"].branches["main"]["README.md"].decode()
    assert "library_name: peft" in card and there.keys() == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert json.loads(there["adapter_config.json"]) == config | {"base_model_name_or_path": None}


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("- Data: `/home/anna/x y/pairs.json`, 3", "- Data: `(a local folder)`, 3"),
        ('"oracle": "/mnt/team/anna/model"', '"oracle": "(a local folder)"'),
        ("C:\\Users\\anna\\models, ~/models/mine", "(a local folder), (a local folder)"),
        ("https://arxiv.org/abs/2305.18290 and owner/name and 3/4, rewards/margins", None),
        ("[a](https://huggingface.co/datasets/a/b)", None),
    ],
)
def test_paths_are_told_from_addresses_and_names(text, clean):
    assert without_paths(text) == (text if clean is None else clean)


def test_a_public_branch_and_weights_of_an_earlier_push(tmp_path, finished, hub):
    words = ("runs/small", "dpo", "--to", "anna/m", "--public", "--revision", "second")
    assert pushes(tmp_path, hub, *words).code == 0
    repository = hub.repositories["anna/m"]
    assert not repository.private and not repository.branches["main"] and repository.branches["second"]
    old = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}", "notes.txt": b"mine"}
    repository.branches["second"] |= old
    done = pushes(tmp_path, hub, *words)
    assert done.code == 0, done.err
    there = repository.branches["second"]
    assert (
        "notes.txt" in there and not {"model-00001-of-00002.safetensors", "model.safetensors.index.json"} & there.keys()
    )
    commits = len(repository.commits)
    assert pushes(tmp_path, hub, *words).code == 0 and len(repository.commits) == commits, "nothing has changed"


def test_an_interrupted_push_is_repeated(tmp_path, finished, hub):
    puts = itertools.count()

    def fails(request: Request) -> int:
        if request.method != "PUT" or next(puts) == 0:
            return 0
        until = time.monotonic() + 20  # the files travel at the same time: the second fails once the first has arrived
        while not hub.stored and time.monotonic() < until:
            time.sleep(0.01)
        return 403

    hub.fails = fails
    failed = pushes(tmp_path, hub, "runs/small", "dpo", "--to", "anna/m")
    assert failed.code == 1 and "Traceback" not in failed.err, failed.err
    for word in ("Error while uploading", "403", "The same command goes on"):
        assert word in failed.err, failed.err
    leaks_nothing(failed, hub, tmp_path)
    assert not hub.repositories["anna/m"].commits and len(hub.stored) == 1
    hub.fails, sent = (lambda request: 0), set(hub.stored)
    before = len(hub.uploads())
    assert pushes(tmp_path, hub, "runs/small", "dpo", "--to", "anna/m").code == 0
    assert len(hub.stored) == 2 and not set(hub.uploads()[before:]) & sent


def test_a_hub_that_is_slow_to_answer_is_asked_again_without_a_word_of_its_addresses(tmp_path, finished, hub):
    seen: list[Request] = []

    def fails(request: Request) -> int:
        seen.extend([request] if request.method == "PUT" else [])
        return 503 if request.method == "PUT" and len(seen) == 1 else 0

    hub.fails = fails
    done = pushes(tmp_path, hub, "runs/small", "dpo", "--to", "anna/m")
    assert done.code == 0 and len(seen) == 3, done.err
    leaks_nothing(done, hub, tmp_path)


def test_tokens(tmp_path, finished, hub):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(TOKEN)  # what `hf auth login` leaves
    refused(pushes(tmp_path, hub, "runs/small", "dpo", "--to", "anna/m", token=None), "set HF_TOKEN")
    assert not hub.requests
    (tmp_path / "hf" / "token").unlink()
    other = "hf_another_token_of_the_test"
    done = pushes(tmp_path, hub, "runs/small", "dpo", "--to", "anna/m", token=other)
    refused(done, "refuses the token in HF_TOKEN (401)", "may write")
    assert other not in done.out + done.err
    refused(pushes(tmp_path, hub, "runs/small", "dpo", "--to", "bob/m"), "refuses the token", "(403)", "bob/m")
    assert not hub.repositories


@pytest.mark.parametrize(
    ("run", "label", "to", "words"),
    [
        ("nowhere", "dpo", "anna/m", ["expected the folder of a run", "recipe.yaml"]),
        ("runs/small", "dppo", "anna/m", ["no label 'dppo'", "Trained here: dpo."]),
        ("runs/small", "otpo", "anna/m", ["'otpo' is not trained to its end", "otpo train", "Trained here: dpo."]),
        ("runs/small", "rest", "anna/m", ["'rest' is not trained to its end"]),
        ("runs/small", "base", "anna/m", ["no label 'base'"]),
        ("runs/small", "dpo", "m", ["--to m", "OWNER/NAME"]),
        ("runs/small", "dpo", "anna/m/n", ["OWNER/NAME"]),
        ("runs/small", "dpo", "anna/m", ["set HF_TOKEN"]),
    ],
)
def test_what_cannot_be_pushed(tmp_path, finished, monkeypatch, run, label, to, words):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError) as error:
        push(tmp_path / run, label, Target(to))
    for word in words:
        assert word in str(error.value), str(error.value)
    with pytest.raises(UserError, match="has no adapters"):
        push(finished.path, "dpo", Target("anna/m"), adapter=True)
