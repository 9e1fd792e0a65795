"""Recorded verdicts of a real judge over HTTP: each comes out, with faults and without."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.servers import replay, replay_stats

from eval.judge.config import JudgeConfig
from eval.judge.table import ledger
from eval.judge.verdicts import judge
from eval.outputs.reading import load_outputs
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
