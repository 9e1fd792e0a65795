"""Where an event loop runs already, as in every cell of a notebook."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from support.servers import ScriptedJudge

from eval.judge.check import check
from eval.judge.config import JudgeConfig
from eval.judge.store import open_store
from eval.judge.verdicts import judge


def run_cell(cell):
    """As a kernel does, which leaves SIGINT alone (`asyncio.run` would take it)."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(cell)
    finally:
        loop.close()


def ask(server: ScriptedJudge, folder: Path, n: int, progress=None):
    rows = [{"instruction": f"Question {i}", "output": f"model {i}", "generator": "model"} for i in range(n)]
    reference = [row | {"output": f"reference {i}", "generator": "reference"} for i, row in enumerate(rows)]
    config = JudgeConfig(url=server.url, model="test", concurrency=2)
    check(config)
    return judge(rows, reference, config, folder / "store.sqlite", "task", progress)


def test_the_judge_gives_the_same_verdicts_inside_a_loop(tmp_path):
    async def cell(server):
        return ask(server, tmp_path / "cell", 8)

    with ScriptedJudge() as server:
        plain, in_cell = ask(server, tmp_path / "plain", 8), run_cell(cell(server))
    assert len(plain) == 8 and plain["preference"].notna().all()
    assert in_cell["preference"].tolist() == plain["preference"].tolist()


def test_an_interrupted_cell_stops_asking_and_keeps_what_came(tmp_path):
    def progress(done: int, total: int, failures: int) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)  # what a notebook's stop button sends

    async def cell(server):
        return ask(server, tmp_path, 200, progress)

    with ScriptedJudge() as server:
        with pytest.raises(KeyboardInterrupt):
            run_cell(cell(server))
        asked = len(server.calls)
    assert asked < 100
    with open_store(tmp_path / "store.sqlite") as store:
        assert 3 <= len(store) <= asked
