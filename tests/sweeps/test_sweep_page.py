"""What the page shows of a sweep: the front, importances that are known, pictures, the winner on fresh prompts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.html_page import assert_sound
from support.sweeps import REGS, sweep_tree, swept

from eval import layout
from eval.board.report import build
from eval.front import on_front
from eval.sweeps.importance import importances
from eval.tasks import Prompt, Task
from otpo.errors import UserError
from pipeline.run.folder import SweepFolder
from pipeline.sweep.held_out import rows_of, split
from pipeline.sweep.results import (
    read_outcomes,
    render,
    with_held_out,
    write_held_out,
    write_results,
    write_summary,
)
from pipeline.sweep.search import plan

RATE = "methods.otpo.learning_rate"
HOSTILE = "<script>alert(1)</script>"
POINTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12)


@given(POINTS)
def test_the_front_is_what_no_trial_dominates(points: list[tuple[int, int]]) -> None:
    frame = pd.DataFrame(points, columns=["win_rate", "avg_length"], dtype=float)
    found = on_front(frame, {"win_rate": "max", "avg_length": "min"})
    for (rate, length), on in zip(points, found, strict=True):
        beaten = any((r, n) != (rate, length) and r >= rate and n <= length for r, n in points)  # equal ones are not
        assert on == (not beaten)


def test_a_trial_without_a_figure_is_not_on_the_front() -> None:
    frame = pd.DataFrame({"win_rate": [50.0, np.nan], "avg_length": [100.0, 1.0]})
    assert on_front(frame, {"win_rate": "max", "avg_length": "min"}).tolist() == [True, False]


def test_importance_is_the_variance_that_a_key_explains_alone() -> None:
    # f = 2 a + b on a full grid: the variances of the terms are as 4 to 1, and nothing is left for both together
    steps = np.linspace(0, 1, 8)
    frame = pd.DataFrame(itertools.product(steps, steps), columns=["a", "b"])
    frame = frame.assign(f=2 * frame["a"] + frame["b"], c="same")
    found = importances(frame, ["a", "b", "c"], "f")
    assert list(found) == ["a", "b"]
    assert found["a"] == pytest.approx(0.8, abs=0.05) and found["b"] == pytest.approx(0.2, abs=0.05)
    # a logarithmic range beside words: f = log c
    frame = pd.DataFrame(itertools.product(("minus", "plus"), (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)), columns=["a", "c"])
    found = importances(frame.assign(f=np.log(frame["c"])), ["a", "c"], "f")
    assert found["c"] > 0.8 and found["a"] < 0.15  # ten trials: a forest is no more exact


def test_few_trials_and_equal_figures_have_no_importance() -> None:
    frame = pd.DataFrame({"a": range(7), "f": range(7)}, dtype=float)
    assert importances(frame, ["a"], "f") == {}
    assert importances(pd.DataFrame({"a": range(9), "f": [1.0] * 9}), ["a"], "f") == {}


def task_of(instructions: list[str]) -> Task:
    prompts = [Prompt(str(i), text, "d") for i, text in enumerate(instructions)]
    return Task("facts", prompts, "facts.jsonl", "instruction")


@given(st.lists(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), min_size=30, max_size=60), st.floats(0.2, 0.8))
def test_held_out_prompts_are_disjoint_complete_and_the_same_every_time(letters: list[str], share: float) -> None:
    letters = [*"abcdefghijklmnopqrstuvwxyz", *letters]
    parts = split(task_of(letters), share)
    assert parts.fresh is not None and parts.fresh.name != parts.trials.name
    ours, theirs = ([p.instruction for p in part.prompts] for part in (parts.trials, parts.fresh))
    assert sorted([*ours, *theirs]) == sorted(letters) and not set(ours) & set(theirs)
    assert abs(len(set(theirs)) - share * 26) <= 0.5
    assert split(task_of(letters[::-1]), share).fresh is not None
    again = split(task_of(letters[::-1]), share).fresh
    assert again is not None and {p.instruction for p in again.prompts} == set(theirs)
    reference = [{"instruction": letter} for letter in letters]
    assert [row["instruction"] for row in rows_of(reference, parts.fresh)] == theirs


def test_nothing_is_held_out_where_the_share_is_0_and_too_few_prompts_are_refused() -> None:
    task = task_of(["a", "b", "c"])
    assert split(task, 0).fresh is None and split(task, 0).trials is task
    with pytest.raises(UserError, match=r"each part needs 2.*sweep\.held_out=0"):
        split(task, 0.25)


def trial(number: int, reg: float, rate: float) -> dict:
    win = 50 + 10 * reg - number % 3
    figures = {
        "win_rate": win,
        "win_rate_low": win - 5,
        "win_rate_high": win + 5,
        "avg_length": 100 + 90 * reg,
        "n_total": 40,
    }
    return {"name": f"reg-{reg:g}_{number}", "params": {REGS: reg, RATE: rate}, "state": "done", "figures": figures}


def test_a_sweep_of_two_objectives_has_a_front_pictures_and_the_winner_on_fresh_prompts(
    tiny_llama: Path, tmp_path: Path
) -> None:
    tree = sweep_tree(tiny_llama, tmp_path)
    tree |= {
        "generate": {"tasks": {"facts": str(tmp_path / "prompts.jsonl")}},
        "judge": {"url": "http://127.0.0.1:1", "model": "m", "reference": "base"},
    }
    params = {REGS: [0.1, 0.5, 1.0], RATE: [1e-6, 1e-5, 1e-4]}
    recipe = swept(tree, params=params, metric=["win_rate", "avg_length"])
    (search,) = plan(recipe)
    assert search.objectives == {"win_rate": "max", "avg_length": "min"} and search.task == "facts"
    grid = itertools.product(*params.values())
    trials = [trial(number, reg, rate) for number, (reg, rate) in enumerate(grid)]
    trials.append({"name": "reg-9", "params": {REGS: 9.0, RATE: 1e-5}, "state": "failed", "error": HOSTILE})
    folder = SweepFolder(tmp_path / "sweep")
    (outcome,) = write_results(recipe, [search], folder, [trials])
    assert outcome.best == "reg-1_6"
    front = outcome.results[outcome.results["front"]]
    assert sorted(front["trial"]) == ["reg-0.1_0", "reg-0.5_3", "reg-1_6"]
    fresh = [
        {"trial": name, "seed": seed, "win_rate": win, "win_rate_low": win - 8, "win_rate_high": win + 8, "n_total": 13}
        for name, seed, win in (("reg-1_6", 42, 51.5), ("reg-1_6.seed-43", 43, 49.0))
    ]
    outcome = with_held_out(outcome, fresh)
    assert outcome.caution is not None
    assert "on 13 fresh prompts: 51.5% (43.5 to 59.5)" in outcome.caution
    assert "60.0% on the 40 that it was chosen by" in outcome.caution
    assert "fresh seeds: 49.0%" in outcome.caution
    write_summary([outcome])
    write_held_out([outcome])
    (again,) = read_outcomes(folder, [search])
    assert again.held_out is not None and again.caution == outcome.caution and render(again).row_count == 10

    summary = json.loads(folder.summary.read_text())
    summary[0]["trials"][0]["trial"] = HOSTILE
    summary[0]["keys"][REGS] = f"$reg$ {HOSTILE}"
    folder.summary.write_text(json.dumps(summary))
    page = build([folder.path], folder.path).read_text()
    assert_sound(folder.path / layout.REPORT)
    assert HOSTILE not in page and "&lt;script&gt;" in page
    for words in ("The sweep", "The front", "Every trial", "What mattered", "of the trials", "fresh", "51.5"):
        assert words in page


def test_a_sweep_by_an_evaluation_makes_a_page_too(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = swept(sweep_tree(tiny_llama, tmp_path))
    search, folder = plan(recipe)[0], SweepFolder(tmp_path / "sweep")
    trials = [
        {"name": f"reg-{reg:g}", "params": {REGS: reg}, "state": "done", "figures": {"eval_loss": reg}}
        for reg in (0.1, 1.0)
    ]
    (outcome,) = write_results(recipe, [search], folder, [trials])
    write_summary([outcome])
    page = build([folder.path], folder.path).read_text()
    assert_sound(folder.path / layout.REPORT)
    assert "Every trial" in page and "shown from 8 finished trials on" in page and "The front" not in page


def test_a_search_by_preferences_shows_no_figures_that_have_no_order(tiny_llama: Path, tmp_path: Path) -> None:
    tree = sweep_tree(tiny_llama, tmp_path) | {
        "generate": {"tasks": {"facts": str(tmp_path / "prompts.jsonl")}},
        "judge": {"url": "http://127.0.0.1:1", "model": "m", "reference": "base"},
    }
    recipe = swept(tree, params={REGS: {"low": 0.1, "high": 1.0}}, search="glisp", metric="win_rate", num_samples=4)
    search, folder = plan(recipe)[0], SweepFolder(tmp_path / "sweep")
    # b beats a, c loses to b, d beats b although c had a larger figure than it
    compared = (("a", None, 50.0), ("b", "a", 80.0), ("c", "b", 10.0), ("d", "b", 51.0))
    trials = [
        {
            "name": name,
            "params": {REGS: 0.1 * n + 0.1},
            "state": "done",
            "against": against,
            "figures": {"win_rate": win},
        }
        for n, (name, against, win) in enumerate(compared)
    ]
    (outcome,) = write_results(recipe, [search], folder, [trials])
    assert outcome.best == "d" and outcome.results["trial"][0] == "d"
    fresh = {"trial": "d", "seed": 42, "win_rate": 44.0, "win_rate_low": 40.0, "win_rate_high": 48.0, "n_total": 9}
    outcome = with_held_out(outcome, [fresh])
    assert outcome.caution == "Win rate of d on 9 fresh prompts: 44.0% (40.0 to 48.0)."
    write_summary([outcome])
    page = build([folder.path], folder.path).read_text()
    assert_sound(folder.path / layout.REPORT)
    assert "44.0" in page and "51.0" not in page and "80.0" not in page
