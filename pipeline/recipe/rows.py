"""The data sets of a recipe before their rows are read, and whether its methods can take them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from otpo.data.convert import RECOGNISED
from otpo.data.formats import FORMATS
from otpo.data.formats.reading import Columns, reading_of
from otpo.data.load import Rows, open_rows
from otpo.errors import UserError
from pipeline.recipe import Recipe


@dataclass(frozen=True)
class DataSet:
    """Rows that are not read yet.

    Attributes:
        name: in a mix; "" for a single source. source: a file or hub name.
        columns: see `data.columns`.
        format: a name of `otpo.data.formats.FORMATS`.
    """

    name: str
    source: str
    rows: Rows
    columns: Columns | None
    format: str


def open_sets(recipe: Recipe, source: str | Mapping[str, str], *, supervised: bool) -> list[DataSet]:
    """The data sets behind a source, in order: one, or those of a mix.

    Raises:
        UserError: one that cannot be read, whose format is not known, or a file of which a split is asked for.
    """
    data = recipe.data
    if isinstance(source, Mapping):
        for name, path in source.items():
            _check_split(f"data.datasets.{name}.split", path, data.datasets[name].split)
        return [
            _open(name, path, (each := data.datasets[name]).split, each.limit, each.columns)
            for name, path in source.items()
        ]
    if supervised:
        return [_open("", source, data.split, None, (recipe.base or {}).get("columns"))]
    _check_split("data.split", source, data.split)
    return [_open("", source, data.split, data.limit, data.columns)]


def _check_split(key: str, source: str, split: str) -> None:
    if split != "train" and Path(source).expanduser().is_file():
        raise UserError(
            f"{key}: {source} is a file, of which all rows are read: leave the key out, or give a file of the split"
            f" '{split}' alone."
        )


def _open(name: str, source: str, split: str, limit: int | None, columns: Columns | None) -> DataSet:
    rows = open_rows(source, split, limit)
    return DataSet(name, source, rows, columns, reading_of(list(islice(rows, RECOGNISED)), columns, source).name)


def check_methods(recipe: Recipe, known: str, source: str) -> bool:
    """Whether a method of the recipe needs labelled completions; a UserError if a method cannot take such rows."""
    names = {label: recipe.method(label).method for label in recipe.methods}
    unpaired = [label for label, method in names.items() if method.objective == "unpaired"]
    format = FORMATS[known]
    if not format.pairs and len(unpaired) < len(names):
        label = next(label for label in names if label not in unpaired)
        holds = "single labelled completions" if format.labelled else f"rows of the format '{known}'"
        way = "train on them with `method: kto`, or give" if format.labelled else "`base` trains on such rows; give"
        raise UserError(
            f"methods.{label}: {names[label].title} needs preference pairs (columns prompt, chosen, rejected), but"
            f" {source} holds {holds} (columns {', '.join(format.columns)}): {way} pairs."
        )
    for label in unpaired:
        title = names[label].title
        if not FORMATS[known].labelled and not FORMATS[known].pairs:
            raise UserError(
                f"methods.{label}: {title} needs completions with a label (columns prompt, completion, label) or"
                f" preference pairs, but {source} has the columns {', '.join(FORMATS[known].columns)}; if it has a"
                " label too, that label is neither true nor false. Add `label`, true for good completions and false for"
                " bad ones."
            )
    return bool(unpaired)
