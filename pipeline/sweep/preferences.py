"""A search that knows no score, only which of two trials' outputs the judge prefers: GLISp, of the package `glis`.

Bemporad and Piga (2021), Machine Learning 110, "Active preference learning based on radial basis functions":
http://dx.doi.org/10.1007/s10994-020-05935-y
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from pipeline.recipe import SweepRange
from pipeline.sweep.search import LEVEL
from pipeline.sweep.space import Params, rounded, trial_name


class PreferenceSearch(Searcher):
    """GLISp as a searcher of Ray Tune: one trial at a time, each compared with the best one before it.

    Args:
        space: key -> its range.
        metric: the trial's win rate in percent over the trial that it was to beat; above 50 it is preferred.
        n_trials: how many trials there will be, those of earlier calls included.
        earlier: records of an earlier call's trials, in the order in which they were compared. Finished ones are the
            first samples; the others are suggested again under their names.

        seed: of what GLISp draws.
        label: what names of trials begin with, if with anything.

    A suggestion is {"params": values, "name": the trial's, "against": name of the best trial so far, None for the
    first}. A trial without a result has lost.
    """

    def __init__(
        self,
        space: dict[str, SweepRange],
        metric: str,
        n_trials: int,
        earlier: list[dict[str, Any]],
        *,
        seed: int,
        label: str | None = None,
    ):
        super().__init__()
        from glis.solvers import GLISp

        self.space, self.win_rate, self.n_trials, self.label = space, metric, n_trials, label
        done = [record for record in earlier if record["state"] == "done"]
        begun = [record for record in earlier if record["state"] != "done"]
        self.known = [*done, *begun][:n_trials]
        samples = [self._point(record["params"]) for record in self.known]

        class Search(GLISp):
            """Begins with the samples that are known."""

            def initialize_(self) -> np.ndarray:
                drawn = super().initialize_()
                for number, sample in enumerate(samples):
                    drawn[number] = (sample - self.d0) / self.dd
                self.X = list(drawn * self.dd + self.d0)
                return drawn

        bounds = tuple(np.array([self._end(space[key], end) for key in space]) for end in ("low", "high"))
        first = max(2, min(2 * len(space), n_trials), len(samples))
        self.search = Search(bounds=bounds, n_initial_random=first, expected_max_evals=n_trials, display=0)
        self.random = np.random.RandomState(seed).get_state()
        with self._own_random():
            self.point, self.following = self.search.initialize()
        self.search.UnknownFeasible.append(True)
        self.search.UnknownSatisfactory.append(True)
        self.best: str | None = None
        self.asked, self.names = 0, {record["name"] for record in self.known}
        self.running: tuple[str, str] | None = None
        for record in done[:n_trials]:
            self.asked += 1
            self._learn(record["name"], record["figures"][metric])

    def suggest(self, trial_id: str) -> Any:
        """The next trial; None while one is running."""
        if self.running is not None:
            return None
        if self.asked >= self.n_trials:
            return Searcher.FINISHED
        params = self._params(self.point)
        name = self.known[self.asked]["name"] if self.asked < len(self.known) else self._new_name(params)
        self.asked += 1
        self.running = (trial_id, name)
        return {"params": params, "name": name, "against": self.best}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Learn from the comparison of the trial that ran."""
        assert self.running is not None and self.running[0] == trial_id
        name, self.running = self.running[1], None
        self._learn(name, None if error else (result or {}).get(self.win_rate))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the trials' records are all that a restart needs."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing; see `save`."""

    def _learn(self, name: str, win_rate: float | None) -> None:
        """Tell GLISp of the newest sample's comparison, and move on to its next one."""
        first = self.asked == 1
        if win_rate is None:  # a trial that failed loses; two that failed are equal
            preference = 0 if self.best is None else 1
        elif self.best is None:
            preference = -1
        else:
            preference = int(np.sign(LEVEL - win_rate))
        if win_rate is not None and preference == -1:
            self.best = name
        with self._own_random():
            self.point = self.following if first else self.search.update(preference)

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        """Draw from a state of our own for the block: glis draws from NumPy's global one."""
        outer = np.random.get_state()  # noqa: NPY002
        np.random.set_state(self.random)  # noqa: NPY002
        try:
            yield
        finally:
            self.random = np.random.get_state()  # noqa: NPY002
            np.random.set_state(outer)  # noqa: NPY002

    def _new_name(self, params: Params) -> str:
        name = trial_name(params, self.label)
        if name in self.names:  # near the optimum, values may be equal to the digits that are kept
            name = f"{name}.{self.asked + 1}"
        self.names.add(name)
        return name

    def _end(self, values: SweepRange, end: str) -> float:
        value = float(getattr(values, end))
        return math.log(value) if values.log else value

    def _point(self, params: Params) -> np.ndarray:
        values = ((key, float(params[key])) for key in self.space)
        return np.array([math.log(value) if self.space[key].log else value for key, value in values])

    def _params(self, point: np.ndarray) -> Params:
        found: Params = {}
        for (key, values), value in zip(self.space.items(), point.tolist(), strict=True):
            plain = math.exp(value) if values.log else value
            plain = min(max(plain, values.low), values.high)
            found[key] = round(plain) if values.integer else rounded(plain)
        return found
