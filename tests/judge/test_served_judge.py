"""A judge that the pipeline serves itself: real vLLM over real HTTP, held against transformers."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml
from pydantic import ValidationError
from support.command import otpo, refused
from support.sweeps import judged_tree, silent
from support.training import settings

from eval.judge.config import JudgeConfig
from otpo.errors import UserError, WorkError
from pipeline.judge.judging import Judge, Match, judge_task
from pipeline.judge.served import check_served, served
from pipeline.recipe import make_recipe

QUESTIONS = ["Name a river.", "What is two and two?", "Why is the sky blue?", "Say hello."]
OUTPUTS = ["The Danube.", "Four.", "Light scatters, and blue scatters most.", "Hello!"]
REFERENCES = ["Rivers are long.", "It is 4.", "It is blue.", "Good morning to you, too."]


def _state(tokenizer: Any, model: Any, first: str, second: str, question: str) -> Any:
    """The last hidden state before the judge's reply."""
    import torch

    from eval.judge.protocols.registry import find_protocol
    from eval.judge.protocols.templates import render

    shown = render(find_protocol("preference"), question, first, second)
    ids = tokenizer.apply_chat_template(shown, add_generation_prompt=True, return_dict=False)
    with torch.inference_mode():
        return model.model(torch.tensor([ids])).last_hidden_state[0, -1]


def _states(tokenizer: Any, model: Any) -> Any:
    """(questions * 2, hidden): the reference first, then the model's output first."""
    import torch

    return torch.stack(
        [
            _state(tokenizer, model, *texts, question)
            for question, output, reference in zip(QUESTIONS, OUTPUTS, REFERENCES, strict=True)
            for texts in ((reference, output), (output, reference))
        ]
    )


@pytest.fixture(scope="session")
def letter_judge(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model that always replies m or M, by a preference that depends on what it is shown.

    The rows of both letters in the head point along the mean of the last states, so that no other token comes near;
    their difference points where the states of these questions differ most.
    """
    import torch
    from transformers import AutoTokenizer

    from otpo.models.fresh import make_model

    folder = tmp_path_factory.mktemp("letter_judge")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = make_model(tokenizer, hidden=64, layers=2, heads=2, tie=False, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
        states = _states(tokenizer, model)
        mean = states.mean(0)
        apart = torch.linalg.svd(states - mean).Vh[0]
        apart -= (apart @ mean) / (mean @ mean) * mean
        apart /= (states @ apart).std()
        head = model.get_output_embeddings().weight
        head.zero_()
        for letter, sign in (("m", -0.5), ("M", 0.5)):
            head[tokenizer.convert_tokens_to_ids(letter)] = 16 * mean / (mean @ mean) + sign * apart
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(texts: list[str], name: str) -> list[dict]:
    return [{"instruction": q, "output": o, "generator": name} for q, o in zip(QUESTIONS, texts, strict=True)]


def preferences_of_transformers(folder: Path) -> list[list[float]]:
    """The preference for the model's output in both orders: 1 + P(M), where m names the output that is shown first."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    m, big_m = (model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(letter)] for letter in "mM")
    second = (_states(tokenizer, model) @ (big_m - m)).double().sigmoid().reshape(-1, 2).tolist()
    return [[1 + as_second, 2 - as_first] for as_second, as_first in second]


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that run: one that has ended may wait for a parent of its own to notice."""
    return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
def test_a_served_judge_prefers_as_transformers_does_and_ends_with_the_body(letter_judge: Path, tmp_path: Path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    config = JudgeConfig(vllm={"model": str(letter_judge), "max_model_len": 2048}, both_orders=True, verdict="logprobs")
    before = set(psutil.Process().children(recursive=True))
    with served(config) as asked:
        assert asked.url.startswith("http://127.0.0.1:")
        assert asked.model.startswith(f"{letter_judge.name}@")
        server = set(psutil.Process().children(recursive=True)) - before
        command = " ".join(part for process in server for part in process.cmdline())
        assert "api_server" in command
        assert os.environ[asked.api_key_env] not in command
        judge = Judge(asked, tmp_path / "store.sqlite")
        match = Match("model", "reference", rows(OUTPUTS, "model"), rows(REFERENCES, "reference"))
        verdicts = judge_task(judge, [match], "task")
    found = verdicts.pivot(index="index", columns="order", values="preference")[["reference_first", "model_first"]]
    wanted = preferences_of_transformers(letter_judge)
    for mine, theirs in zip(found.to_numpy().tolist(), wanted, strict=True):
        assert mine == pytest.approx(theirs, abs=2e-3)
    assert max(map(max, wanted)) - min(map(min, wanted)) > 0.3
    assert not alive(server)
    assert asked.api_key_env not in os.environ


@pytest.mark.slow
def test_a_run_is_judged_by_a_model_that_it_serves(letter_judge: Path, tiny_llama: Path, tmp_path: Path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps({"instruction": q}) + "\n" for q in QUESTIONS))
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {}}, train={"max_steps": 2, "workers": 1})
    tree["generate"] = {"tasks": {"mine": "tasks.jsonl"}, "backend": "transformers", "max_tokens": 8}
    tree["judge"] = {"vllm": {"model": str(letter_judge), "max_model_len": 2048}, "both_orders": True}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    done = otpo(tmp_path, "run", "recipe.yaml")
    assert done.code == 0, done.err
    run = tmp_path / "runs" / "small"
    board = pd.read_csv(run / "leaderboard.csv")
    assert set(board["judge"]) == {letter_judge.name} and set(board["n_failed"]) == {0}
    verdicts = pd.read_parquet(run / "judge" / "mine" / "verdicts.parquet")
    assert verdicts["judge_model"].dropna().str.fullmatch(rf"{letter_judge.name}@[0-9a-f]{{8}}").all()
    again = otpo(tmp_path, "run", "recipe.yaml")
    assert again.code == 0 and "vLLM loads" not in again.err


@pytest.mark.slow
def test_trials_and_milestones_are_judged_by_a_model_that_is_served(
    letter_judge: Path, tiny_llama: Path, tmp_path: Path, ray_cluster: None
):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from pipeline.run.folder import RunFolder
    from pipeline.run.run import run
    from pipeline.sweep.sweep import sweep

    tree = judged_tree(tiny_llama, tmp_path, "")
    tree["judge"] = {"vllm": {"model": str(letter_judge), "max_model_len": 2048}, "reference": "base"}
    tree["train"] |= {"max_steps": 4}
    tried = {"params": {"train.learning_rate": [1e-3, 1e-2]}, "label": "dpo", "metric": "win_rate", "judge_every": 2}
    folder = RunFolder(tmp_path / "tiny")
    (outcome,) = sweep(make_recipe(tree | {"sweep": tried}), folder.path, progress=silent, say=silent)
    assert set(outcome.results["state"]) == {"done"} and outcome.results["win_rate"].between(0, 100).all()
    assert [step for label in folder.sweep.trials() for step, _ in label.milestones()] == [2, 2]

    chosen = {"eval_every": 2, "best_metric": "win_rate", "best_mode": "max"}
    tree |= {"name": "chosen", "methods": {"dpo": {}}, "train": tree["train"] | chosen, "sweep": {}}
    folder = RunFolder(tmp_path / "chosen")
    run(make_recipe(tree), folder.path, progress=silent)
    assert json.loads(folder.label("dpo").selected.read_text())["step"] in (2, 4)
    verdicts = pd.read_parquet(folder.verdicts("sums"))
    assert verdicts["judge_model"].dropna().str.startswith(f"{letter_judge.name}@").all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"judge": {"vllm": "rm"}}, ["judge.vllm", "writes text", "'rm'"]),
        ({"judge": {"vllm": "nowhere/none"}}, ["nowhere/none"]),
        ({"judge": {"vllm": {"model": "base", "max_len": 3}}}, ["judge.vllm.max_len", "max_model_len"]),
        ({"judge": {"vllm": "base", "url": "http://127.0.0.1:1/v1"}}, ["vllm stands in place of a judge's url"]),
    ],
)
def test_what_cannot_be_served_is_refused_before_training(changes, words, tiny_llama: Path, tmp_path: Path):
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"instruction": "Hello?"}))
    tree = settings(tmp_path, tiny_llama, methods={"dpo": {}, "rm": {"method": "reward-model"}})
    tree |= {"generate": {"tasks": {"mine": "tasks.jsonl"}}, **changes}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    refused(otpo(tmp_path, "run", "recipe.yaml", HF_HUB_OFFLINE="1"), *words)


@pytest.mark.slow
def test_a_label_without_a_chat_template_is_no_judge(tiny_llama: Path, tmp_path: Path):
    model = tmp_path / "silent"
    model.mkdir()
    for file in tiny_llama.iterdir():
        if file.name != "chat_template.jinja":
            (model / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tasks.jsonl").write_text(json.dumps({"instruction": "Hello?"}))
    tree = settings(tmp_path, model, methods={"dpo": {}}, judge={"vllm": "base"})
    tree["generate"] = {"tasks": {"mine": "tasks.jsonl"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    refused(otpo(tmp_path, "run", "recipe.yaml"), "judge.vllm", "chat template", "'base'")


@pytest.mark.slow
def test_a_server_ends_with_a_process_that_is_killed(letter_judge: Path, tmp_path: Path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    program = f"""
import time
from eval.judge.config import JudgeConfig
from pipeline.judge.served import served
with served(JudgeConfig(vllm={{"model": {str(letter_judge)!r}, "max_model_len": 2048}})):
    print("up", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL),  # PR_SET_PDEATHSIG
    )
    assert process.stdout.readline() == "up\n"
    server = psutil.Process(process.pid).children(recursive=True)
    assert len(server) >= 3  # what watches, the server, its engine
    process.kill()
    process.wait()
    until = time.monotonic() + 60
    while alive(server) and time.monotonic() < until:
        time.sleep(0.2)
    assert not alive(server)


@pytest.mark.slow
def test_a_server_that_does_not_start_says_vllms_own_words(letter_judge: Path, tmp_path: Path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    broken = tmp_path / "broken"
    shutil.copytree(letter_judge, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": config["intermediate_size"] + 64}))
    with (
        pytest.raises(WorkError, match=r"(?s)vLLM could not serve the judge .*broken.*last words.*whole log"),
        served(JudgeConfig(vllm={"model": str(broken), "max_model_len": 2048})),
    ):
        pass


def test_a_command_ends_where_the_other_end_of_its_input_closes():
    from pipeline.judge import until_closed

    sleeper = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(99)"]
    process = subprocess.Popen(
        [sys.executable, until_closed.__file__, *sleeper], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    child = psutil.Process(process.pid).children()[0]
    process.stdin.close()
    assert process.wait(timeout=30) == 0
    assert not child.is_running()


def test_a_judge_is_an_address_or_a_model_and_not_both(tmp_path: Path, tiny_llama: Path):
    with pytest.raises(ValidationError, match="vllm stands in place of a judge's url"):
        JudgeConfig(url="http://127.0.0.1:1/v1", vllm="some/model")
    short = JudgeConfig(vllm="org/judge-7b")
    assert (short.vllm.model, short.model, short.named) == ("org/judge-7b", "judge-7b", True)
    assert JudgeConfig(vllm={"model": "runs/x/models/dpo/model"}).model == "dpo"
    with pytest.raises(UserError, match="none"):
        check_served("judge.vllm", JudgeConfig(vllm=str(tmp_path / "none")).vllm)
    silent = tmp_path / "silent"
    silent.mkdir()
    for file in tiny_llama.iterdir():
        if file.name != "chat_template.jinja":
            (silent / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="chat template"):
        check_served("judge.vllm", JudgeConfig(vllm=str(silent)).vllm)
