"""Recorded verdicts of a real judge over HTTP: each comes out, with faults and without."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.servers import replay, replay_stats

from eval.board.leaderboard import board_title, leaderboard
from eval.judge.config import JudgeConfig
from eval.judge.table import ledger
from eval.judge.verdicts import judge
from eval.outputs.reading import load_outputs
from eval.stats.win_rate import by_prompt
from otpo.files import read_rows

REPO = Path(__file__).resolve().parents[2]
TOOL = REPO.parent / "shared" / "tools" / "replay_judge.py"


@pytest.mark.parametrize("protocol", ["preference", "alpaca_eval"])
def test_every_recorded_preference_comes_out_over_http(shared_data, tmp_path, protocol):
    if protocol == "alpaca_eval":
        pytest.importorskip("alpaca_eval")
    folder = shared_data / "alpaca_eval" / "alpaca-7b"
    recorded = pd.DataFrame(read_rows(folder / "annotations.json.gz"))
    model = load_outputs(folder / "model_outputs.json.gz")
    reference = load_outputs(folder.parent / "reference_gpt4_1106_preview.json.gz")
    with replay(TOOL, folder / "annotations.json.gz") as url:
        config = JudgeConfig(url=url, model="any", protocol=protocol)
        frame = judge(model, reference, config, tmp_path / "s.sqlite", "alpaca_eval")
        stats = replay_stats(url)
    assert np.abs(frame["preference"] - recorded["preference"]).max() < 1e-9
    assert stats["order_as_recorded"] == stats["answered"] == stats["calls"] == 802
    assert ledger(frame)["identical"] == 3


def test_both_orders_of_the_official_prompt_give_the_recorded_preference(shared_data, tmp_path):
    pytest.importorskip("alpaca_eval")
    folder = shared_data / "alpaca_eval" / "claude-2.1"
    recorded = pd.DataFrame(read_rows(folder / "annotations.json.gz"))[:200]
    model = load_outputs(folder / "model_outputs.json.gz")[:200]
    reference = load_outputs(folder.parent / "reference_gpt4_1106_preview.json.gz")[:200]
    with replay(TOOL, folder / "annotations.json.gz") as url:  # the recording's own order, and its mirror image
        config = JudgeConfig(url=url, model="gpt-4-1106-preview", protocol="alpaca_eval", both_orders=True)
        frame = judge(model, reference, config, tmp_path / "s.sqlite", "alpaca_eval")
    prompts = by_prompt(frame)
    assert np.abs(prompts["preference"] - recorded["preference"]).max() < 1e-9 and not prompts["flipped"].any()
    outputs = {str(model[0]["generator"]): model}
    board = leaderboard(frame, outputs, reference, judge=str(config.model), protocol=config.protocol)
    assert board["orders"].tolist() == ["both"]
    names = ("alpaca_eval", "gpt-4-1106-preview", "alpaca_eval", "gpt4_1106_preview")
    assert (board_title(*names), board_title(*names, "both")) == ("AlpacaEval 2", "AlpacaEval 2, but in both orders")


def test_faults_do_not_change_a_single_verdict(shared_data, tmp_path):
    folder = shared_data / "alpaca_eval" / "gpt4_gamed"
    model = load_outputs(folder / "model_outputs.json.gz")[:150]
    reference = load_outputs(folder.parent / "reference_gpt4_1106_preview.json.gz")[:150]
    frames = []
    for faults in ((), ("--faults", "429,500,drop,garbage,nologprobs", "--fault-rate", "0.2")):
        with replay(TOOL, folder / "annotations.json.gz", *faults) as url:
            config = JudgeConfig(url=url, model="any")
            store = tmp_path / f"{len(frames)}.sqlite"
            frames.append(judge(model, reference, config, store, "alpaca_eval"))
            stats = replay_stats(url)
            assert stats.get("repeats", 0) == 0
            calls = stats["calls"]
            assert (
                judge(model, reference, config, store, "alpaca_eval")["cached"].sum()
                == 150 - ledger(frames[-1])["identical"]
            )
            assert replay_stats(url)["calls"] == calls == frames[-1]["attempts"].sum()
    assert stats["faults"] > 10
    assert frames[1]["error"].isna().all()
    assert frames[0]["preference"].tolist() == frames[1]["preference"].tolist()
