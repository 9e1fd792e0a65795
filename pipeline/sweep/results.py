"""What comes out of a sweep: `results.csv`, `plot.svg`, `best.yaml`, and a table for the terminal."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from pipeline.recipe import Recipe, dump_yaml
from pipeline.run.folder import SweepFolder
from pipeline.sweep.search import Search, best_recipe, short_keys

if TYPE_CHECKING:
    from rich.table import Table

FIGURES = (
    *("win_rate", "win_rate_low", "win_rate_high", "standard_error", "discrete_win_rate", "length_adjusted_winrate"),
    *("length_controlled_winrate", "avg_length", "length_ratio", "n_total", "n_failed", "step", "loss"),
)
SHOWN = ("win_rate_low", "win_rate_high", "length_adjusted_winrate", "avg_length", "eval_loss")
"""Columns of the terminal's table beside the metric, where they are present."""


@dataclass(frozen=True)
class Outcome:
    """A finished sweep.

    Attributes:
        results: a row a trial, best first; written to `results.csv`.
        did: whether this call did anything.
    """

    folder: SweepFolder
    metric: str
    results: pd.DataFrame
    did: bool = True

    @property
    def best(self) -> str | None:
        """Name of the best trial, None if all failed."""
        done = self.results[self.results["state"] == "done"]
        return None if done.empty else str(done["trial"].iloc[0])

    @property
    def failed(self) -> int:
        """How many trials ended with an error."""
        return int((self.results["state"] == "failed").sum())

    @property
    def caution(self) -> str | None:
        """A warning beside a best win rate: it was chosen on the prompts that it is measured on."""
        done = self.results[self.results["state"] == "done"]
        if self.metric != "win_rate" or len(done) < 2:
            return None
        equals = int((done["win_rate_high"].iloc[1:] >= done["win_rate_low"].iloc[0]).sum())
        overlap = f" The intervals of {equals} other trials overlap that of the best." if equals else ""
        return (
            f"The best of {len(done)} trials was chosen by the win rate shown, which is therefore optimistic.{overlap}"
        )


def write_results(recipe: Recipe, search: Search, folder: SweepFolder, trials: list[dict[str, Any]]) -> Outcome:
    """Write the table, the plot and the best recipe.

    Args:
        trials: records of the trials (`trial.json`).

    Returns:
        The outcome. Trials that failed or that ASHA stopped are rows too, after the others.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    keys = list(recipe.sweep.params)
    results = pd.DataFrame([_row(trial, keys, search.metric) for trial in trials])
    results["done"] = results["state"] == "done"
    by, ascending = ["done", search.metric], [False, search.mode == "min"]
    results = results.sort_values(by, ascending=ascending, kind="stable", ignore_index=True).drop(columns="done")
    results = results.dropna(axis="columns", how="all")
    if "error" not in results:
        results["error"] = None
    results.to_csv(folder.results, index=False)
    outcome = Outcome(folder, search.metric, results)
    if outcome.best is not None:
        params = next(trial["params"] for trial in trials if trial["name"] == outcome.best)
        folder.best.write_text(dump_yaml(best_recipe(recipe, params)))
        _plot(results, keys, search).savefig(folder.plot)
    return outcome


def read_outcome(folder: SweepFolder, search: Search) -> Outcome:
    """The outcome that an earlier call wrote."""
    return Outcome(folder, search.metric, pd.read_csv(folder.results), did=False)


def _row(trial: dict[str, Any], keys: list[str], metric: str) -> dict[str, Any]:
    figures = trial.get("figures", {})
    names = [metric, *(name for name in FIGURES if name != metric)]
    names += sorted(name for name in figures if name.startswith("eval_") and name != metric)
    return (
        {"trial": trial["name"], **{key: trial["params"].get(key) for key in keys}}
        | {name: figures.get(name) for name in names}
        | {"seconds": trial.get("seconds"), "state": trial["state"], "error": trial.get("error")}
    )


def _plot(results: pd.DataFrame, keys: list[str], search: Search) -> Any:
    """The metric against each swept key, with the interval where there is one; ticks where values were tried."""
    from matplotlib.figure import Figure

    done = results[results["state"] != "failed"].dropna(subset=[search.metric])
    figure = Figure(figsize=(4.2 * len(keys), 3.6), layout="constrained")
    for number, key in enumerate(keys, start=1):
        axes = figure.add_subplot(1, len(keys), number)
        numeric = pd.api.types.is_numeric_dtype(done[key]) and not pd.api.types.is_bool_dtype(done[key])
        values = done[key] if numeric else done[key].astype(str)
        if search.metric == "win_rate":
            below, above = (
                (done["win_rate"] - done["win_rate_low"]).abs(),
                (done["win_rate_high"] - done["win_rate"]).abs(),
            )
            axes.errorbar(values, done["win_rate"], [below, above], fmt="none", ecolor="0.7", capsize=3)
            axes.axhline(50, color="0.6", linewidth=0.8, linestyle="--")
            place: dict[str, Any] = {
                "xycoords": ("axes fraction", "data"),
                "va": "bottom",
                "fontsize": "small",
                "color": "0.45",
            }
            axes.annotate("level with the reference", (0.02, 50), **place)
        for state, marker in (("done", "o"), ("stopped", "x")):
            chosen = done["state"] == state
            axes.plot(values[chosen], done[search.metric][chosen], marker, color="#1f5aa6", label=state)
        best = done[done["state"] == "done"].head(1)
        axes.plot(values.loc[best.index], best[search.metric], "o", markersize=11, fillstyle="none", color="#c2410c")
        if numeric:
            tried = sorted(float(value) for value in values.unique())
            if tried[0] > 0 and tried[-1] / tried[0] >= 10:
                axes.set_xscale("log")
            if len(tried) <= 8:
                axes.set_xticks(tried, [f"{value:g}" for value in tried])
                axes.minorticks_off()
        axes.set_xlabel(key)
        name = search.metric.replace("_", " ") if search.task else search.metric
        axes.set_ylabel(f"{name}{' (%)' if search.task else ''}" if number == 1 else "")
        axes.spines[["top", "right"]].set_visible(False)
        if (done["state"] == "stopped").any() and number == 1:
            axes.legend(frameon=False, fontsize="small")
    return figure


def render(outcome: Outcome) -> Table:
    """The results for a terminal, best first."""
    from rich.table import Table

    results = outcome.results
    keys = [key for key in results if str(key).startswith(("methods.", "train."))]
    columns = [outcome.metric, *(name for name in SHOWN if name in results and name != outcome.metric)]
    table = Table(title=f"{len(results)} trials by {outcome.metric}", title_justify="left")
    table.add_column("trial")
    for heading in (*short_keys([str(key) for key in keys]).values(), *columns):
        table.add_column(str(heading), justify="right")
    table.add_column("state")
    for row in results.to_dict("records"):
        figures = [_number(row[key], "g") for key in keys] + [_number(row.get(name), ".4g") for name in columns]
        error = "" if pd.isna(row.get("error")) else f": {row['error']}"
        table.add_row(str(row["trial"]), *figures, f"{row['state']}{error}")
    return table


def _number(value: Any, form: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return format(value, form) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
