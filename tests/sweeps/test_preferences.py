"""Search by preferences alone: GLISp through Ray Tune takes the path of the package's own `solve`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("glis", reason="the extra glisp is not installed")

from glis.solvers import GLISp
from support.sweeps import REGS, sweep_tree, swept

from otpo.errors import UserError
from pipeline.recipe import SweepRange, make_recipe
from pipeline.sweep.preferences import PreferenceSearch
from pipeline.sweep.results import winner_of
from pipeline.sweep.search import plan

SPACE = {"x": SweepRange(low=-2, high=2), "y": SweepRange(low=-1, high=1)}
CAMEL_MINIMUM = -1.0316  # at (0.0898, -0.7126) and its mirror image
TRIALS = 21


def camel(x: float, y: float) -> float:
    """The six-hump camel function (Dixon and Szego 1978)."""
    return (4 - 2.1 * x**2 + x**4 / 3) * x**2 + x * y + (4 * y**2 - 4) * y**2


def own_solve(function: Callable[..., float], seed: int) -> GLISp:
    """The package's own loop."""
    np.random.seed(seed)  # noqa: NPY002 - what glis draws from
    search = GLISp(bounds=(np.array([-2.0, -1.0]), np.array([2.0, 1.0])), display=0)
    search.solve(lambda new, best: int(np.sign(round(function(*new) - function(*best), 9))), TRIALS - 1)
    return search


def compare(values: dict[str, Any], *, folder: str) -> None:
    """A trial: its function value is known here, and told to the search only by who wins."""
    from ray import tune

    value = camel(**values["params"])
    Path(folder, f"{values['name']}.json").write_text(json.dumps([value, values["params"]]))
    win = 50.0
    if values["against"] is not None:
        best = json.loads(Path(folder, f"{values['against']}.json").read_text())[0]
        win = 50 - 50 * np.sign(value - best)
    tune.report({"win_rate": float(win)})


def step(search: PreferenceSearch, function: Callable[..., float], seen: dict[str, dict[str, Any]]) -> None:
    """One trial without Tune; `seen` gets its record."""
    asked = search.suggest("t")
    assert isinstance(asked, dict) and search.suggest("another") is None
    value, against = function(**asked["params"]), asked["against"]
    win = 50.0 if against is None else 50 - 50 * float(np.sign(value - seen[against]["value"]))
    seen[asked["name"]] = {**asked, "value": value, "state": "done", "figures": {"win_rate": win}}
    search.on_trial_complete("t", {"win_rate": win})


@pytest.mark.slow
def test_through_tune_it_takes_the_path_of_solve_to_the_optimum(tmp_path: Path, ray_cluster: None) -> None:
    from ray import cloudpickle, tune

    # workers of a cluster that another test has started do not find this module
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    own = own_solve(camel, 0)
    search = PreferenceSearch(SPACE, "win_rate", TRIALS, [], seed=0)
    tuner = tune.Tuner(
        tune.with_resources(partial(compare, folder=str(tmp_path)), tune.PlacementGroupFactory([{"memory": 1}])),
        tune_config=tune.TuneConfig(search_alg=search, num_samples=TRIALS, max_concurrent_trials=1),
        run_config=tune.RunConfig(name="tune", storage_path=str(tmp_path / "ray"), verbose=0),
    )
    tuner.fit()
    found = [
        json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"), key=lambda p: p.stat().st_mtime_ns)
    ]
    assert len(found) == TRIALS
    np.testing.assert_allclose([[p["x"], p["y"]] for _, p in found], own.X, atol=2e-3)
    best = min(value for value, _ in found)
    assert best == pytest.approx(camel(*own.xbest), abs=1e-3)
    assert best < CAMEL_MINIMUM + 0.05
    assert json.loads((tmp_path / f"{search.best}.json").read_text())[0] == pytest.approx(best)


@pytest.mark.slow
def test_it_is_about_as_fast_as_solve_over_several_draws() -> None:
    ours, theirs = [], []
    for seed in range(5):  # the same draws: how near 21 trials come differs more between draws than between the two
        search, seen = PreferenceSearch(SPACE, "win_rate", TRIALS, [], seed=seed), dict[str, dict[str, Any]]()
        for _ in range(TRIALS):
            step(search, camel, seen)
        assert search.suggest("t") == "FINISHED"
        assert search.best == winner_of(list(seen.values()), "win_rate")
        ours.append(seen[str(search.best)]["value"])
        assert ours[-1] == min(record["value"] for record in seen.values())
        theirs.append(camel(*own_solve(camel, seed).xbest))
    assert np.median(ours) < max(np.median(theirs), CAMEL_MINIMUM) + 0.05


@pytest.mark.slow
def test_a_restart_keeps_what_was_compared_and_asks_again_for_what_was_begun() -> None:
    first, seen = PreferenceSearch(SPACE, "win_rate", TRIALS, [], seed=0), dict[str, dict[str, Any]]()
    for _ in range(12):
        step(first, camel, seen)
    begun = first.suggest("t")
    assert isinstance(begun, dict)
    records = [*seen.values(), begun | {"state": "running"}]
    again = PreferenceSearch(SPACE, "win_rate", TRIALS, records, seed=12)
    assert again.best == first.best
    asked = again.suggest("t")
    assert asked == begun
    again.running = None
    again.asked -= 1
    for _ in range(TRIALS - 12):
        step(again, camel, seen)
    assert again.suggest("t") == "FINISHED" and len(seen) == TRIALS
    assert seen[str(again.best)]["value"] < CAMEL_MINIMUM + 0.2


def test_a_trial_that_fails_has_lost() -> None:
    search, seen = PreferenceSearch(SPACE, "win_rate", TRIALS, [], seed=0), dict[str, dict[str, Any]]()
    search.suggest("t")
    search.on_trial_complete("t", error=True)
    assert search.best is None
    step(search, camel, seen)
    best = search.best
    assert best is not None and seen[best]["against"] is None
    search.suggest("t")
    search.on_trial_complete("t", {"done": True})
    assert search.best == best


def test_logarithmic_and_whole_ranges_stay_in_their_bounds() -> None:
    space = {
        "train.learning_rate": SweepRange(low=1.2345e-6, high=1e-3, log=True),
        "train.max_steps": SweepRange(low=2, high=9, integer=True),
    }
    search, seen = PreferenceSearch(space, "win_rate", 12, [], seed=0), dict[str, dict[str, Any]]()

    def far(**params: float) -> float:
        return abs(np.log(params["train.learning_rate"] / 3e-5)) + abs(params["train.max_steps"] - 6)

    for _ in range(12):
        step(search, far, seen)
    params = [record["params"] for record in seen.values()]
    assert all(1.23e-6 <= p["train.learning_rate"] <= 1e-3 and p["train.max_steps"] in range(2, 10) for p in params)
    assert all(isinstance(p["train.max_steps"], int) for p in params)


def test_what_preferences_cannot_search_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    tree = sweep_tree(tiny_llama, tmp_path)
    ranges = {REGS: {"low": 0.1, "high": 1}}
    with pytest.raises(UserError, match=r"glisp compares outputs.*win_rate"):
        plan(swept(tree, params=ranges, search="glisp", metric="eval_loss"))
    judged = tree | {
        "generate": {"tasks": {"facts": "prompts.jsonl"}},
        "judge": {"url": "http://127.0.0.1:1", "model": "m", "reference": "base"},
    }
    with pytest.raises(UserError, match="glisp needs ranges"):
        plan(make_recipe(judged | {"sweep": {"params": {REGS: [0.1, 1.0]}, "search": "glisp"}}))
    (found,) = plan(make_recipe(judged | {"sweep": {"params": ranges, "search": "glisp", "num_samples": 5}}))
    assert found.grid is None and found.n_trials == 5 and found.by_preference
