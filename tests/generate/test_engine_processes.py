"""Engines on several workers, by another backend, and gone when their driver is."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from support.oracles.greedy import PROMPTS, oracle
from transformers import AutoTokenizer

from pipeline.generate.engine import Sampling
from pipeline.generate.pool import EnginePool

DRIVER = """
import sys, ray
from eval.tasks import Prompt
from pipeline.generate.engine import EngineConfig, Sampling
from pipeline.generate.pool import EnginePool

model, out = sys.argv[1:]
ray.init(address="local", num_cpus=2, log_to_driver=False, logging_level="ERROR")
prompts = [Prompt(id=str(i), instruction=f"Question {i}?", dataset="test") for i in range(4000)]
with EnginePool(EngineConfig(device="cpu", max_model_len=128, batch_size=8), model) as pool:
    show = lambda what, done, *_: print("done", done, flush=True)
    pool.generate(model, "a", prompts, Sampling(max_tokens=96), out, progress=show)
"""


@pytest.mark.slow
def test_two_workers_give_the_answers_of_one_and_another_architecture_gets_new_engines(
    vllm_pool, sharp_models, tmp_path: Path
):
    from otpo.models.fresh import make_model

    one = vllm_pool.generate(sharp_models[0], "a", PROMPTS, Sampling(max_tokens=24), tmp_path / "one")
    with EnginePool(replace(vllm_pool.config, workers=2, batch_size=4), sharp_models[0]) as pool:
        two = pool.generate(sharp_models[0], "a", PROMPTS, Sampling(max_tokens=24), tmp_path / "two")
        sure = oracle(sharp_models[0], PROMPTS, 24)
        for a, b in zip(one.outputs, two.outputs, strict=True):
            assert a == b or a["id"] not in sure
        tokenizer = AutoTokenizer.from_pretrained(sharp_models[0])
        deeper = tmp_path / "deeper"
        make_model(tokenizer, hidden=64, layers=3, heads=2).save_pretrained(deeper)
        tokenizer.save_pretrained(deeper)
        assert len(pool.generate(deeper, "b", PROMPTS, Sampling(max_tokens=4), tmp_path / "deep").outputs) == 24


@pytest.mark.slow
def test_transformers_behind_the_same_pool_gives_vllms_greedy_answers(vllm_pool, sharp_models, tmp_path: Path):
    with EnginePool(replace(vllm_pool.config, backend="transformers"), sharp_models[1]) as pool:
        ours = pool.generate(sharp_models[1], "a", PROMPTS, Sampling(max_tokens=24), tmp_path / "transformers")
    vllms = vllm_pool.generate(sharp_models[1], "a", PROMPTS, Sampling(max_tokens=24), tmp_path / "vllm")
    sure = oracle(sharp_models[1], PROMPTS, 24)
    for a, b in zip(ours.outputs, vllms.outputs, strict=True):
        assert a == b or a["id"] not in sure


def wait_for(condition, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.2)
    return False


def processes_of(mark: str) -> list[psutil.Process]:
    """Living processes that inherited the mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("OTPO_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads other processes' environments")
@pytest.mark.parametrize("end", ["SIGKILL of the driver", "Ctrl-C in the terminal", "SIGKILL of the engine"])
def test_nothing_outlives_the_driver_however_it_ends(end: str, sharp_models, tmp_path: Path):
    mark = f"{os.getpid()}-{time.time_ns()}"
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "OTPO_TEST_MARK": mark, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": root}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(sharp_models[0]), str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C reaches a whole group
        preexec_fn=lambda: ctypes.CDLL(None).prctl(
            1, signal.SIGKILL
        ),  # PR_SET_PDEATHSIG: not even if this test is killed
    )
    try:
        assert driver.stdout is not None
        steps = (int(line.split()[1]) for line in driver.stdout if line.startswith("done "))
        counts = [next(steps) for _ in range(3)]
        assert 0 < counts[0] < counts[1] < counts[2]
        engines = [p for p in processes_of(mark) if "_EngineActor" in " ".join(p.cmdline())]
        assert len(engines) == 1
        if end == "SIGKILL of the engine":
            engines[0].kill()
            assert any(step > 200 for step in steps), "a new engine goes on"
        if end == "Ctrl-C in the terminal":
            os.killpg(driver.pid, signal.SIGINT)
        else:
            driver.kill()
        assert wait_for(lambda: not processes_of(mark), 30), [" ".join(p.cmdline())[:80] for p in processes_of(mark)]
        lines = (tmp_path / "model_outputs.partial.jsonl").read_text().splitlines()
        assert len(lines) > counts[2], "what was reported was on disk, after the line of how it was made"
        assert all(json.loads(line) for line in lines[: counts[2] + 1])
    finally:
        for process in processes_of(mark):
            process.kill()
        driver.wait()
