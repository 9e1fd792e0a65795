"""What the page shows of a sweep, from the `sweep.json` that it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from eval.front import on_front
from eval.sweeps.figures import front_picture, headings, parallel_coordinates
from eval.sweeps.importance import FEWEST_TRIALS, importances

JUDGED = ("win_rate", "win_rate_low", "win_rate_high", "length_adjusted_winrate", "avg_length", "n_total")


def sweep_view(sweep: Mapping[str, Any]) -> dict[str, Any]:
    """The section of one swept label.

    Args:
        sweep: label; keys (column -> short name); objectives (column -> "min" or "max"; none where trials were judged
            against each other); trials, a row each, the best first; held_out, rows as `held_out.csv` has them.
    """
    keys, objectives = sweep["keys"], sweep["objectives"]
    trials = pd.DataFrame(sweep["trials"])
    done = trials[trials["state"] == "done"].reset_index(drop=True)
    several = len(objectives) > 1
    found = {name: importances(done, list(keys), name) for name in objectives}
    shares = [
        {"key": keys[key], "shares": [100 * found[name].get(key, 0.0) if found[name] else None for name in objectives]}
        for key in sorted(keys, key=lambda key: -max((shares.get(key, 0.0) for shares in found.values()), default=0.0))
    ]
    return {
        "label": sweep["label"],
        "n": len(done),
        "headings": headings(list(objectives)),
        "front": done["trial"][on_front(done, objectives)].tolist() if several else [],
        "front_picture": front_picture(done, objectives) if several and len(done) > 1 else "",
        "parallel": parallel_coordinates(done, keys, objectives),
        "importances": shares if any(found.values()) else [],
        "too_few": bool(objectives) and len(done) < FEWEST_TRIALS,
        "fewest": FEWEST_TRIALS,
        "held_out": [{"trial": row["trial"], "seed": row["seed"], **_judged(row)} for row in sweep["held_out"]],
        "flattering": {"trial": done["trial"][0], **_judged(done.iloc[0].to_dict())} if len(done) else None,
    }


def labels_view(sweeps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The best trial of each label of one sweep, side by side; None for a sweep of one label.

    Args:
        sweeps: as for `sweep_view`, one for each label.

    Returns:
        `headings`, the names of the objectives; `judged`, whether the winners were judged on fresh prompts; `rows`:
        label, trial (None where none came to its end), its `values` by short name, the `figures` that it was chosen
        by, `fresh` as a row of `held_out`, n trials and failed ones.
    """
    if len(sweeps) < 2:
        return None
    rows = []
    for sweep in sweeps:
        done = [trial for trial in sweep["trials"] if trial["state"] == "done"]
        best = done[0] if done else {}
        row = {
            "label": sweep["label"],
            "trial": best.get("trial"),
            "values": {short: best.get(key) for key, short in sweep["keys"].items()},
            "figures": [best.get(name) for name in sweep["objectives"]],
            "fresh": _judged(sweep["held_out"][0] if sweep["held_out"] else {}),
            "n": len(sweep["trials"]),
            "failed": sum(trial["state"] == "failed" for trial in sweep["trials"]),
        }
        rows.append(row)
    headed = headings(list(sweeps[0]["objectives"]))
    judged = any(sweep["held_out"] for sweep in sweeps)
    return {"headings": headed, "judged": judged, "rows": rows}


def _judged(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in JUDGED}
