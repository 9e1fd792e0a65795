"""Rows of any known format become examples, still text, with a report of what was left out."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from otpo.data.formats.reading import Columns, Reading, reading_of
from otpo.data.report import DataReport, check_usable
from otpo.data.rows import BadRow, Example, check_completions, content
from otpo.data.template import of_rows, template_of
from otpo.errors import UserError
from otpo.files import Row

RECOGNISED = 10_000  # first rows that tell the format
OPPOSITE = "the opposite of an earlier row: chosen and rejected the other way round, or the other label"


def convert(
    rows: Iterable[Row],
    source: str | Path = "rows",
    *,
    pairs: bool | None = None,
    template: str = "auto",
    columns: Columns | None = None,
) -> tuple[list[Example], DataReport]:
    """Turn rows into examples, and report what was left out.

    Left out and counted: rows that lack a column or hold something that is not text; empty completions (nothing but
    white space); identical completions, which carry no preference (TRL keeps them). Duplicate prompts and duplicate
    rows stay and are counted. Nothing is repaired silently.

    Args:
        rows: as `load_rows` or `open_rows` gives them.
        source: what the report and the errors call them.
        pairs: True wants pairs; False wants single completions, and takes the chosen ones of pairs; None takes what the
            rows are.
        template: a value of `data.template`. "chat" makes messages of the turns of transcripts (`Format.messages`);
            otherwise strings stay as they are.
        columns: `data.columns`: what a column is -> its name in the rows; a name -> None leaves the column out.

    Raises:
        UserError: unknown format, columns that are not understood, no pairs where they are wanted, messages for a
            literal template, or no usable row.
    """
    examples, report = read_examples(rows, source, pairs=pairs, template=template, columns=columns)
    return list(examples), report


def read_examples(
    rows: Iterable[Row],
    source: str | Path = "rows",
    *,
    pairs: bool | None = None,
    good: bool = False,
    template: str = "auto",
    columns: Columns | None = None,
) -> tuple[Iterator[Example], DataReport]:
    """As `convert`, for rows that are read as they are asked for: the report is whole once the examples are.

    Rows of a format that joins rows (`Format.group`) are held in memory.

    Args:
        rows: can be iterated over again.
        good: leave out single completions whose label says that they are bad.
    """
    reading = reading_of(list(islice(rows, RECOGNISED)), columns, str(source))
    name, known = reading.name, reading.format
    if pairs and not known.pairs:
        raise UserError(
            f"{source}: expected preference pairs (columns chosen and rejected), found the format '{name}' with the "
            f"columns {', '.join(known.columns)}"
        )
    single = pairs is False and known.pairs
    why = "; ".join([reading.why] + [known.about] * bool(known.about) + ["the chosen completions are taken"] * single)
    report = DataReport(str(source), name, why, n_rows=0, n_groups=0, ignored=reading.ignored)
    return _examples(rows, reading, report, single=single, good=good, template=template), report


def _examples(
    rows: Iterable[Row], reading: Reading, report: DataReport, *, single: bool, good: bool, template: str
) -> Iterator[Example]:
    renamed = map(reading.renamed, rows)
    numbered: Iterable[tuple[int, Row]] = enumerate(renamed)
    if group := reading.format.group:
        held = list(renamed)
        numbered, report.n_rows = group(held), len(held)
    templates: set[str] = set()
    repeated = {"duplicate prompt": Repeated(), "duplicate row": Repeated()}
    opposites = Opposites()
    lengths = array("q")
    for number, row in numbered:
        report.n_groups += 1
        report.n_rows = max(report.n_rows, report.n_groups)
        try:
            parts = reading.parts(row, template)
            completions = parts.completions[:1] if single else parts.completions
            check_completions(completions)
            if good and parts.label is False:
                raise BadRow("label says that the completion is bad")
        except BadRow as reason:
            report.problems.setdefault(str(reason), []).append(number)
            continue
        except KeyError as column:
            report.problems.setdefault(f"no {column.args[0]}", []).append(number)
            continue
        templates.add(template_of(template, (parts.prompt, *completions), f"{report.source}: row {number}"))
        for note in parts.notes:
            report.notes.setdefault(note, []).append(number)
        asked, told = hash_of([parts.prompt, parts.tools]), tuple(map(hash_of, completions))
        repeated["duplicate prompt"].add(number, hash_of(parts.prompt))
        said = hash((asked, told, parts.label))
        repeated["duplicate row"].add(number, said)
        if len(told) == 2 or parts.label is not None:
            opposites.add(number, said, hash((asked, told[::-1], None if parts.label is None else not parts.label)))
        if parts.label is not None:
            label = str(parts.label).lower()
            report.labels[label] = report.labels.get(label, 0) + 1
        lengths.extend(len(content(text)) for text in (parts.prompt, *completions))
        report.n_usable += 1
        yield Example.of(parts, number, completions=completions)
    report.notes |= {what: numbers for what, found in repeated.items() if (numbers := found.numbers())}
    if numbers := opposites.numbers():
        report.notes[OPPOSITE] = numbers
    check_usable(report)
    report.choose(of_rows(template, templates))
    report.measure("characters", np.frombuffer(lengths, np.int64).reshape(report.n_usable, -1))


class Repeated:
    """Which of many texts were there before. Remembers 16 bytes of each."""

    def __init__(self) -> None:
        self.hashes, self.rows = array("q"), array("q")

    def add(self, row: int, text: int) -> None:
        """Note the hash of a row's text."""
        self.hashes.append(text)
        self.rows.append(row)

    def numbers(self) -> list[int]:
        """The rows whose text an earlier one has."""
        again = np.ones(len(self.rows), dtype=bool)
        again[np.unique(np.frombuffer(self.hashes, np.int64), return_index=True)[1]] = False
        return np.frombuffer(self.rows, np.int64)[again].tolist()


class Opposites:
    """Which of many rows say the opposite of an earlier one. Remembers 24 bytes of each."""

    def __init__(self) -> None:
        self.said, self.denied, self.rows = array("q"), array("q"), array("q")

    def add(self, row: int, said: int, denied: int) -> None:
        """Note the hash of what a row says, and of what would be its opposite."""
        self.said.append(said)
        self.denied.append(denied)
        self.rows.append(row)

    def numbers(self) -> list[int]:
        """The rows whose opposite an earlier one says."""
        if not len(self.rows):
            return []
        said, first = np.unique(np.frombuffer(self.said, np.int64), return_index=True)
        denied = np.frombuffer(self.denied, np.int64)
        at = np.searchsorted(said, denied).clip(max=len(said) - 1)
        found = (said[at] == denied) & (first[at] < np.arange(len(denied)))
        return np.frombuffer(self.rows, np.int64)[found].tolist()


def hash_of(text: Any) -> int:
    """A hash of texts, messages or tools, of this process."""
    return hash(json.dumps(text, sort_keys=True, default=str))
