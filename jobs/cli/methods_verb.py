"""The verb `methods`: the table of all methods, or one method's row as help."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from jobs.cli.terminal import console
from otpo.errors import UserError


def methods(
    name: Annotated[str | None, typer.Argument(help="print this method's formula, needs and hyperparameters")] = None,
) -> None:
    """The table of methods. With a NAME, that method's formula, needs and hyperparameters."""
    if name is None:
        _print_table()
    else:
        _print_row(name)


def _print_table() -> None:
    from otpo.methods import METHODS, SHARED, WEIGHT_RULES

    table = Table("method", "weights x loss", "needs", title="Methods")
    table.add_column("defaults", overflow="fold")
    table.add_column("paper", overflow="fold")
    for name, row in METHODS.items():
        defaults = ", ".join(f"{key}={value}" for key, value in row.defaults.items())
        needs = ", ".join([*_NEEDS[row.objective], *sorted(row.needs)]) or "nothing"
        address = row.paper.removeprefix("https://")
        table.add_row(name, f"{row.weight_rule.name} x {row.loss.name}", needs, defaults, address)
    console.print(table)
    _print("`otpo methods NAME` prints a method's formula and what its hyperparameters mean.")
    _print(
        "Methods of pairs also take another rule for their tokens, with its hyperparameters, as in"
        f" {{method: hinge, weights: otpo, reg: 0.1}}: {', '.join(WEIGHT_RULES)}"
    )
    shared = ", ".join(f"{each.name}={each.default}" for each in SHARED.values())
    _print(f"Every method also takes: {shared}")


def _print_row(name: str) -> None:
    from otpo.methods import METHODS, WEIGHT_RULES, nearest

    if name not in METHODS:
        raise UserError(
            f"otpo methods: expected a method's name, found {name!r}{nearest(name, METHODS)}. "
            "`otpo methods` lists them all."
        )
    from otpo.methods.describe import describe

    row = describe(METHODS[name])
    _print(f"{row['title']} (`method: {row['name']}`)")
    _print(f"  {row['note']}")
    _print(f"Paper: {row['paper']}")
    _print_function("Loss", row["loss"])
    if row["weight_rule"]:
        _print_function("Token weights", row["weight_rule"])
        others = [rule for rule in WEIGHT_RULES if rule != row["weight_rule"]["name"]]
        _print(f"  Or, with `weights: RULE`: {', '.join(others)}")
    _print(f"Trains on: {_DATA[row['objective']]}")
    _print("Needs, in addition to the policy's log-probabilities:" if row["needs"] else "Needs: only the policy")
    for need, meaning in row["needs"].items():
        _print(f"  {need}: {meaning}")
    table = Table("hyperparameter", "default", "allowed", "meaning")
    for each in row["hyperparameters"]:
        default = str(each["default"])
        default = default.lower() if isinstance(each["default"], bool) else default  # as YAML writes it
        table.add_row(each["name"], default, each["allowed"], each["meaning"])
    console.print(table)


_NEEDS = {"pair": [], "unpaired": ["labelled completions"], "reward": ["a scalar head"]}
_DATA = {
    "pair": "preference pairs",
    "unpaired": "labelled completions, or preference pairs split into two completions each",
    "reward": "preference pairs; the model gets a scalar head in place of the vocabulary's",
}


def _print_function(title: str, function: dict[str, str]) -> None:
    _print(f"{title}: {function['name']} ({function['path']})")
    _print(f"  {function['formula']}")
    if function["notation"]:
        _print(f"  {function['notation']}")


def _print(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
