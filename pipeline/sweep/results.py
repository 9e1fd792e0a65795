"""What comes out of a sweep: `results.csv`, `plot.svg`, `best.yaml`, and a table for the terminal."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from eval.sweeps.front import on_front
from otpo.files import write_json
from pipeline.recipe import Recipe, dump_yaml
from pipeline.run.folder import SweepFolder
from pipeline.sweep.search import LEVEL, Search, best_recipe, short_keys

if TYPE_CHECKING:
    from rich.table import Table

FIGURES = (
    *("win_rate", "win_rate_low", "win_rate_high", "standard_error", "discrete_win_rate", "length_adjusted_winrate"),
    *("length_controlled_winrate", "avg_length", "length_ratio", "n_total", "n_failed", "step", "loss"),
)
SHOWN = ("front", "against", "win_rate_low", "win_rate_high", "length_adjusted_winrate", "avg_length", "eval_loss")
"""Columns of the terminal's table beside the metric, where they are present."""


@dataclass(frozen=True)
class Outcome:
    """A finished sweep.

    Attributes:
        results: a row a trial, best first; written to `results.csv`.
        held_out: the winner's figures on prompts that no trial was judged on, and those of its values with fresh seeds:
            a row each, the winner first; written to `held_out.csv`. None where nothing is held out.
        did: whether this call did anything.
    """

    folder: SweepFolder
    metric: str
    results: pd.DataFrame
    held_out: pd.DataFrame | None = None
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
        """A best win rate beside that on fresh prompts, or a warning: it was chosen on what it is measured on."""
        done = self.results[self.results["state"] == "done"]
        if self.held_out is not None:
            best, fresh = done.iloc[0], self.held_out.iloc[0]
            said = (
                f"Win rate of {best['trial']} on {fresh['n_total']:.0f} fresh prompts: {fresh['win_rate']:.1f}%"
                f" ({fresh['win_rate_low']:.1f} to {fresh['win_rate_high']:.1f})."
            )
            if "against" not in self.results:  # else the winner's figures are against another trial
                chosen = f"{best['win_rate']:.1f}% on the {best['n_total']:.0f} that it was chosen by"
                said += f" It was {chosen}, which flatters it: report the first."
            again = ", ".join(f"{rate:.1f}%" for rate in self.held_out["win_rate"].iloc[1:])
            return said + (f" Trained again with fresh seeds: {again}." if again else "")
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
    folder.held_out.unlink(missing_ok=True)
    keys = list(recipe.sweep.params)
    results = pd.DataFrame([_row(trial, keys, list(search.objectives)) for trial in trials])
    results["done"] = results["state"] == "done"
    by, ascending = ["done", search.metric], [False, search.mode == "min"]
    if search.by_preference:  # the winner first; the figures of the others, each against another trial, have no order
        results["done"] = np.where(results["trial"] == winner_of(trials, search.metric), 2, results["done"])
        by, ascending = ["done"], [False]
    results = results.sort_values(by, ascending=ascending, kind="stable", ignore_index=True)
    if len(search.objectives) > 1:
        results.insert(1, "front", on_front(results.where(results["done"]), search.objectives))
    results = results.drop(columns="done").dropna(axis="columns", how="all")
    if "error" not in results:
        results["error"] = None
    results.to_csv(folder.results, index=False)
    outcome = Outcome(folder, search.metric, results)
    if outcome.best is not None:
        params = next(trial["params"] for trial in trials if trial["name"] == outcome.best)
        folder.best.write_text(dump_yaml(best_recipe(recipe, params)))
        _plot(results, keys, search).savefig(folder.plot)
    return outcome


def winner_of(trials: list[dict[str, Any]], metric: str) -> str | None:
    """The trial that no later one beat: each was compared with the winner before it."""
    finished = [trial for trial in trials if trial["state"] == "done"]
    best: str | None = None
    while following := next(
        (
            trial["name"]
            for trial in finished
            if trial["against"] == best and (best is None or trial["figures"][metric] > LEVEL)
        ),
        None,
    ):
        best = following
    return best


def read_outcome(folder: SweepFolder, search: Search) -> Outcome:
    """The outcome that an earlier call wrote."""
    held_out = pd.read_csv(folder.held_out) if folder.held_out.exists() else None
    return Outcome(folder, search.metric, pd.read_csv(folder.results), held_out, did=False)


def with_held_out(outcome: Outcome, rows: list[dict[str, Any]]) -> Outcome:
    """The outcome with the winner's figures on fresh prompts, which are written to `held_out.csv`."""
    names = ["trial", "seed", *(name for name in FIGURES if any(row.get(name) is not None for row in rows))]
    table = pd.DataFrame(rows)[names]
    table.to_csv(outcome.folder.held_out, index=False)
    return replace(outcome, held_out=table)


def write_summary(search: Search, recipe: Recipe, outcome: Outcome) -> None:
    """Write what the page shows of the sweep."""
    keys = short_keys(list(recipe.sweep.params))
    columns = [
        "trial",
        "state",
        *keys,
        *search.objectives,
        *(name for name in FIGURES if name not in search.objectives),
    ]
    held_out = [] if outcome.held_out is None else _records(outcome.held_out)
    summary = {
        "label": search.label,
        "keys": keys,
        "objectives": {} if search.by_preference else search.objectives,  # figures against others have no order
        "trials": _records(outcome.results.reindex(columns=columns)),
        "held_out": held_out,
    }
    write_json(outcome.folder.summary, [summary])


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return json.loads(table.to_json(orient="records"))


def _row(trial: dict[str, Any], keys: list[str], metrics: list[str]) -> dict[str, Any]:
    figures = trial.get("figures", {})
    names = [*metrics, *(name for name in FIGURES if name not in metrics)]
    names += sorted(name for name in figures if name.startswith("eval_") and name not in metrics)
    return (
        {"trial": trial["name"], "against": trial.get("against"), **{key: trial["params"].get(key) for key in keys}}
        | {name: figures.get(name) for name in names}
        | {"seconds": trial.get("seconds"), "attempts": trial.get("attempts"), "state": trial["state"]}
        | {"error": trial.get("error")}
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
        if search.metric == "win_rate" and "win_rate_low" in done:
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
            level = "level with the trial before" if search.by_preference else "level with the reference"
            axes.annotate(level, (0.02, 50), **place)
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
    columns: list[str] = [outcome.metric, *(name for name in SHOWN if name in results and name != outcome.metric)]
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
