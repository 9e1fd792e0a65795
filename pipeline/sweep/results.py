"""What comes out of a sweep: `results.csv`, `plot.svg`, `best.yaml`, and tables for the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from eval.front import on_front
from otpo.files import write_json
from pipeline.recipe import Recipe, dump_yaml
from pipeline.run.folder import SweepFolder
from pipeline.sweep.plot import plot
from pipeline.sweep.search import LEVEL, Search
from pipeline.sweep.space import Params, short_keys
from pipeline.sweep.trial_recipes import best_recipe, of_label

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
    """A finished search of one label.

    Attributes:
        results: a row a trial, best first; `results.csv` has those of all labels.
        held_out: the winner's figures on prompts that no trial was judged on, and those of its values with fresh seeds:
            a row each, the winner first; in `held_out.csv`. None where nothing is held out.
        did: whether this call did anything.
    """

    search: Search
    folder: SweepFolder
    results: pd.DataFrame
    held_out: pd.DataFrame | None = None
    did: bool = True

    @property
    def metric(self) -> str:
        """The objective that names the winner."""
        return self.search.metric

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
        said = f"{self.search.label}: " if self.search.of_several else ""
        if self.held_out is not None:
            best, fresh = done.iloc[0], self.held_out.iloc[0]
            said += (
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
        chosen = f"The best of {len(done)} trials was chosen by the win rate shown, which is therefore optimistic."
        return f"{said}{chosen}{overlap}"


def write_results(
    recipe: Recipe, searches: Sequence[Search], folder: SweepFolder, trials: Sequence[list[dict[str, Any]]]
) -> list[Outcome]:
    """Write the table, the plot and the recipe with the best values of each label.

    Args:
        trials: the records (`trial.json`) of each search.

    Returns:
        The outcome of each search. Trials that failed or that ASHA stopped are rows too, after the others.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.held_out.unlink(missing_ok=True)
    outcomes = [
        Outcome(search, folder, _table(search, records)) for search, records in zip(searches, trials, strict=True)
    ]
    _joined(outcomes, [outcome.results for outcome in outcomes]).to_csv(folder.results, index=False)
    best: Params = {}
    for outcome, records in zip(outcomes, trials, strict=True):
        params: Params = next((trial["params"] for trial in records if trial["name"] == outcome.best), {})
        best |= of_label(params, outcome.search.label) if outcome.search.of_several else params
    if best:
        folder.best.write_text(dump_yaml(best_recipe(recipe, best)))
        finished = [outcome for outcome in outcomes if outcome.best is not None]
        plot([(outcome.results, outcome.search) for outcome in finished]).savefig(folder.plot)
    return outcomes


def _table(search: Search, trials: list[dict[str, Any]]) -> pd.DataFrame:
    """A row a trial, the best first."""
    results = pd.DataFrame([_row(trial, list(search.space), list(search.objectives)) for trial in trials])
    results["done"] = results["state"] == "done"
    by, ascending = ["done", search.metric], [False, search.mode == "min"]
    if search.by_preference:  # the winner first; the figures of the others, each against another trial, have no order
        results["done"] = np.where(results["trial"] == winner_of(trials, search.metric), 2, results["done"])
        by, ascending = ["done"], [False]
    results = results.sort_values(by, ascending=ascending, kind="stable", ignore_index=True)
    if len(search.objectives) > 1:
        results.insert(1, "front", on_front(results.where(results["done"]), search.objectives))
    return _known(results.drop(columns="done"))


def _known(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that hold something, and `error` always."""
    table = table.dropna(axis="columns", how="all")
    return table if "error" in table else table.assign(error=None)


def _joined(outcomes: Sequence[Outcome], tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The tables of all labels as one, the label in front; that of a sweep of one label as it is."""
    if not outcomes[0].search.of_several:
        return tables[0]
    named = [
        table.assign(label=outcome.search.label).astype(object) for outcome, table in zip(outcomes, tables, strict=True)
    ]
    joined = pd.concat(named, ignore_index=True)
    columns = [str(name) for name in joined]
    first: list[str] = [name for name in ("label", "trial", "front", "against") if name in columns]
    first += [name for name in columns if name.startswith(("methods.", "train."))]
    last = [name for name in ("seconds", "attempts", "state", "error") if name in columns]
    others = [name for name in columns if name not in (*first, *last)]
    return joined[[*first, *others, *last]]


def _of_label(table: pd.DataFrame, search: Search) -> pd.DataFrame:
    """The rows of one label of a table that `_joined` made."""
    if not search.of_several:
        return table
    return _known(table[table["label"] == search.label].drop(columns="label")).reset_index(drop=True)


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


def read_outcomes(folder: SweepFolder, searches: Sequence[Search]) -> list[Outcome]:
    """The outcomes that an earlier call wrote."""
    results = pd.read_csv(folder.results)
    held_out = pd.read_csv(folder.held_out) if folder.held_out.exists() else None
    outcomes = []
    for search in searches:
        fresh = None if held_out is None else _of_label(held_out, search).drop(columns="error", errors="ignore")
        fresh = None if fresh is None or fresh.empty else fresh
        outcomes.append(Outcome(search, folder, _of_label(results, search), fresh, did=False))
    return outcomes


def with_held_out(outcome: Outcome, rows: list[dict[str, Any]]) -> Outcome:
    """The outcome with the winner's figures on fresh prompts."""
    names = ["trial", "seed", *(name for name in FIGURES if any(row.get(name) is not None for row in rows))]
    return replace(outcome, held_out=pd.DataFrame(rows)[names])


def write_held_out(outcomes: Sequence[Outcome]) -> None:
    """Write `held_out.csv`, where something was held out."""
    judged = [outcome for outcome in outcomes if outcome.held_out is not None]
    if judged:
        tables = [outcome.held_out for outcome in judged if outcome.held_out is not None]
        _joined(judged, tables).to_csv(judged[0].folder.held_out, index=False)


def write_summary(outcomes: Sequence[Outcome]) -> None:
    """Write what the page shows of the sweep."""
    write_json(outcomes[0].folder.summary, [_summary(outcome) for outcome in outcomes])


def _summary(outcome: Outcome) -> dict[str, Any]:
    search = outcome.search
    keys = short_keys(list(search.space))
    columns = [
        "trial",
        "state",
        *keys,
        *search.objectives,
        *(name for name in FIGURES if name not in search.objectives),
    ]
    return {
        "label": search.label,
        "keys": keys,
        "objectives": {} if search.by_preference else search.objectives,  # figures against others have no order
        "trials": _records(outcome.results.reindex(columns=columns)),
        "held_out": [] if outcome.held_out is None else _records(outcome.held_out),
    }


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


def render(outcome: Outcome) -> Table:
    """The results for a terminal, best first."""
    from rich.table import Table

    results = outcome.results
    keys = [key for key in results if str(key).startswith(("methods.", "train."))]
    columns: list[str] = [outcome.metric, *(name for name in SHOWN if name in results and name != outcome.metric)]
    of_label = f" of {outcome.search.label}" if outcome.search.of_several else ""
    table = Table(title=f"{len(results)} trials{of_label} by {outcome.metric}", title_justify="left")
    table.add_column("trial")
    for heading in (*short_keys([str(key) for key in keys]).values(), *columns):
        table.add_column(str(heading), justify="right")
    table.add_column("state")
    for row in results.to_dict("records"):
        figures = [_number(row[key], "g") for key in keys] + [_number(row.get(name), ".4g") for name in columns]
        error = "" if pd.isna(row.get("error")) else f": {row['error']}"
        table.add_row(str(row["trial"]), *figures, f"{row['state']}{error}")
    return table


def render_best(outcomes: Sequence[Outcome]) -> Table:
    """Each label's best trial for a terminal, side by side."""
    from rich.table import Table

    metric = outcomes[0].metric
    table = Table(title="The best of each label", title_justify="left")
    for heading in ("label", "trial"):
        table.add_column(heading)
    fresh = any(outcome.held_out is not None for outcome in outcomes)
    columns = ("win_rate", "win_rate_low", "win_rate_high", "length_adjusted_winrate", "avg_length") if fresh else ()
    for heading in (metric, *(f"{name}, fresh" for name in columns), "trials", "failed"):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        best = None if outcome.best is None else outcome.results.iloc[0]
        judged = {} if outcome.held_out is None else outcome.held_out.iloc[0].to_dict()
        against_trials = outcome.search.by_preference  # such figures are not comparable between labels
        figures = [_number(None if best is None or against_trials else best[metric], ".4g")]
        figures += [_number(judged.get(name), ".4g") for name in columns]
        table.add_row(
            outcome.search.label, outcome.best or "none", *figures, str(len(outcome.results)), str(outcome.failed)
        )
    return table


def _number(value: Any, form: str) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return format(value, form) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
