"""What is measured of a run against the small world's truth."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from jobs.small_world import world as small_world
from jobs.small_world.prepare import prepare
from jobs.small_world.truth import compare, deciding_token, interval, measure, read_outputs
from jobs.small_world.world import answer, wrong_filling
from pipeline.run.folder import RunFolder


@pytest.fixture(scope="module")
def world_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small_world")
    prepare(folder, seed=3, entities=30, posts=20, base_answers=2)
    return folder


def pair(chosen: str, rejected: str, chosen_weights: list[float], rejected_weights: list[float]) -> dict:
    return {
        "chosen_tokens": chosen.split(),
        "rejected_tokens": rejected.split(),
        "chosen_weights": chosen_weights,
        "rejected_weights": rejected_weights,
    }


def test_even_weights_decide_nothing() -> None:
    row = pair("It is Paris . end", "Well , it is Rome . end", [1.0] * 5, [0.7] * 7)
    figures = deciding_token([row], {"Paris", "Rome"})
    assert figures["auc"] == pytest.approx(0.5) and figures["ratio"] == pytest.approx(1.0) and figures["n"] == 2


def test_the_auc_is_the_share_of_filler_that_weighs_less_and_the_shared_prefix_does_not_count() -> None:
    # After "It is": Paris (3) beats "." (1) and ties with "end" (3): AUC 3/4, ratio 3 / (7/3). Rome (1) loses against
    # both: AUC 0, ratio 1 / (7/3). The heavy prefix changes nothing.
    row = pair("It is Paris . end", "It is Rome . end", [90, 90, 3, 1, 3], [90, 90, 1, 3, 3])
    figures = deciding_token([row], {"Paris", "Rome"})
    assert figures["auc"] == pytest.approx((0.75 + 0.0) / 2)
    assert figures["ratio"] == pytest.approx((9 / 7 + 3 / 7) / 2)


def test_pairs_that_agree_about_the_truth_say_nothing() -> None:
    row = pair("It is Paris . end", "Well , it is Paris . end", [1.0] * 5, [1.0] * 7)
    assert deciding_token([row], {"Paris", "Rome"}) == {
        "auc": None,
        "auc_low": None,
        "auc_high": None,
        "ratio": None,
        "n": 0,
    }


def test_intervals_treat_an_entity_as_one() -> None:
    values = [float(k % 2) for k in range(100)]
    alone = interval(values, range(100))
    together = interval(values, [k // 20 * 2 + k % 2 for k in range(100)])
    assert alone["value"] == together["value"] == 0.5
    assert alone["low"] == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02)
    assert together["high"] - together["low"] > 2 * (alone["high"] - alone["low"])
    assert interval([1.0] * 5, range(5)) == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 5}


def test_accuracy_words_and_gain_come_out_as_they_were_made(world_dir: Path) -> None:
    world, rng = small_world.load(world_dir / "truth.json"), random.Random(0)

    def outputs(wrong_every: int, style: str) -> list[dict]:
        rows = []
        for task in ("facts", "summaries"):
            for number, item in enumerate(world.of(task)):
                bad = number % wrong_every == 0
                filling = wrong_filling(item, world.words, rng) if bad else item.truth
                rows.append({"instruction": item.questions()[0], "output": answer(item, style, filling, rng)})
        return rows

    report = compare({label: read_outputs(world, outputs(every, style)) for label, every, style in
                      (("base", 2, "terse"), ("better", 10**9, "rambling"))})  # fmt: skip
    for part, figure in report["accuracy"]["base"].items():
        task, split = ("summaries" if "summaries" in part else "facts"), part.removeprefix("summaries_")
        right = [number % 2 != 0 for number, item in enumerate(world.of(task)) if item.split == split]
        assert figure["value"] == pytest.approx(np.mean(right)) and figure["n"] == len(right)
        better = report["accuracy"]["better"][part]["value"]
        assert report["gain"]["better"][part]["value"] == pytest.approx(better - figure["value"])
        assert report["words"]["better"][part] > 3 * report["words"]["base"][part]
    assert "base" not in report["gain"]
    assert list(report["accuracy"]["base"]) == ["trained", "held_out", "summaries_trained", "summaries_held_out"]


def test_measure_reads_a_run_and_weighs_its_pairs(world_dir: Path, tmp_path: Path) -> None:
    from otpo.methods.spec import resolve

    (tmp_path / "world").symlink_to(world_dir)
    world, rng = small_world.load(world_dir / "truth.json"), random.Random(0)
    for label in ("base", "otpo"):
        folder = tmp_path / "models" / label / "facts"
        folder.mkdir(parents=True)
        asked = [(item, item.questions()[0]) for item in world.of("facts")]
        rows = [{"instruction": question, "output": answer(item, "terse", item.truth, rng)} for item, question in asked]
        (folder / "model_outputs.json").write_text(json.dumps(rows))
    pairs = []
    for item in world.of("facts", "trained"):
        right, wrong = item.truth, wrong_filling(item, world.words, rng)
        texts = (answer(item, "rambling", right, rng), answer(item, "terse", wrong, rng))
        sides = {
            side: [{"role": "assistant", "content": text}]
            for side, text in zip(("chosen", "rejected"), texts, strict=True)
        }
        pairs.append({"prompt": [{"role": "user", "content": item.questions()[0]}], **sides})
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    methods = {"otpo": {"reg": 0.2}, "ld-dpo": {"ld_alpha": 0.0}, "sampo": {}, "dpo": {}, "simpo": {}}
    specs = {label: resolve(label, settings) for label, settings in methods.items()}
    report = measure(RunFolder(tmp_path), ["base", "otpo"], specs)
    assert report == json.loads((tmp_path / "world.json").read_text())
    assert report["accuracy"]["otpo"]["held_out"]["value"] == 1.0
    deciding = {row["label"]: row for row in report["deciding_token"]}
    assert deciding["uniform"]["auc"] == 0.5 and deciding["uniform"]["ratio"] == pytest.approx(1.0)
    assert deciding["otpo"]["reg"] == 0.2 and deciding["otpo"]["n"] == 2 * len(pairs)
    assert {"ld-dpo", "sampo"} < set(deciding) and not {"dpo", "simpo"} & set(deciding), "even weights are one row"
    assert deciding["ld-dpo"]["auc"] != 0.5, "the tail of the longer side has no weight, whatever it says"
    sharp, even = deciding["otpo at reg 0.03"], deciding["otpo at reg 1"]
    assert abs(sharp["ratio"] - 1) > abs(even["ratio"] - 1), "the smaller reg, the further from even weights"
