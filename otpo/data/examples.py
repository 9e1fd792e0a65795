"""Preference files: read them, recognise their format, and say what they hold.

`load_rows` gives the rows as they are, `convert` turns them into examples (a prompt and its answers, still text) with
a report. The formats are in `otpo.data.formats`; `otpo.data.tokens` makes token ids of examples. Rows are numbered from
0 in the order of the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from otpo.data.formats.columns import FORMATS, recognise
from otpo.data.rows import BadRow, Example, Row, check_answers, content
from otpo.errors import UserError
from otpo.files import ROW_SUFFIXES, read_rows

# ---- reading ----


def load_rows(source: str | Path, split: str = "train") -> list[Row]:
    """Read the rows of a local file, or of a data set of the Hugging Face hub.

    Args:
        source: a file that `otpo.files.read_rows` reads; anything else is a name (or a folder) for
            `datasets.load_dataset`.
        split: the split of a hub data set; files have none.

    Raises:
        UserError: nothing there, not readable as what its name says, or no rows.
    """
    path = Path(source).expanduser()
    if path.is_file() or (not path.is_dir() and _names_a_file(str(source))):
        return read_rows(path)
    rows = _read_hub(str(source), split)
    if not rows:
        raise UserError(f"{source} holds no rows: expected at least one")
    return rows


def _names_a_file(source: str) -> bool:
    # Hub names are "name" or "owner/name".
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith((*ROW_SUFFIXES, ".gz"))


def _read_hub(name: str, split: str) -> list[Row]:
    try:
        import datasets

        return list(datasets.load_dataset(name, split=split))
    except Exception as error:  # the hub client raises dozens of unrelated types; all mean "not to be had"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"'{name}' is neither a file here (looked in {Path.cwd()}) nor a data set that could be loaded from the "
            f"hub (split '{split}'): {reason:.300}. Give the path of a {', '.join(ROW_SUFFIXES)} file, or check the "
            "name and the network."
        ) from error


# ---- examples and the report ----


@dataclass
class DataReport:
    """What a data file holds and what became of each row.

    Attributes:
        source: the file or hub name. format: a name of FORMATS. why: what the format was known by.
        n_rows: rows read. n_groups: how many examples they could give: as many as rows, or fewer where a format joins
            rows, which then have the number of the first. n_usable: examples that they give.
        problems: reason -> numbers of the rows left out for it.
        notes: remark -> numbers of the rows it is true of; these rows are used.
        template: "chat" (the tokenizer's chat template), "literal" (strings as they are) or "chat and literal"; empty
            before tokenisation.
        lengths: "<part> <unit>" -> mean, median, p95, max, where the part is prompt, chosen, rejected or completion and
            the unit characters (of the usable rows' texts) or tokens (before truncation).
        labels: label -> number of examples, where they have one.
        longer: unit -> number of pairs whose "chosen" or "rejected" is longer, or whose answers are of "equal" length.
    """

    source: str
    format: str
    why: str
    n_rows: int
    n_groups: int
    n_usable: int = 0
    problems: dict[str, list[int]] = field(default_factory=dict)
    notes: dict[str, list[int]] = field(default_factory=dict)
    template: str = ""
    lengths: dict[str, dict[str, float]] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    longer: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def counted(self) -> str:
        """What `n_groups` and `n_usable` count."""
        return "rows" if self.n_groups == self.n_rows else "pairs of rows"

    def measure(self, unit: str, lengths: Sequence[Sequence[int]]) -> None:
        """Fill in `lengths` and `longer` from a sequence (prompt, answer, ...) of lengths for each example."""
        table = np.array(lengths, dtype=np.int64)
        names = ("prompt", "chosen", "rejected") if table.shape[1] == 3 else ("prompt", "completion")
        for name, column in zip(names, table.T, strict=True):
            self.lengths[f"{name} {unit}"] = {
                "mean": round(float(column.mean()), 2),
                "median": float(np.median(column)),
                "p95": round(float(np.quantile(column, 0.95)), 2),
                "max": int(column.max()),
            }
        if table.shape[1] == 3:
            difference = table[:, 1] - table[:, 2]
            counts = {"chosen": difference > 0, "rejected": difference < 0, "equal": difference == 0}
            self.longer[unit] = {side: int(where.sum()) for side, where in counts.items()}

    def chosen_longer(self, unit: str = "characters") -> float:
        """Fraction of the pairs with answers of different length in which the chosen one is longer (nan if none)."""
        counts = self.longer[unit]
        unequal = counts["chosen"] + counts["rejected"]
        return counts["chosen"] / unequal if unequal else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: counts and the first ten row numbers in place of all of them."""

        def brief(rows: dict[str, list[int]]) -> dict[str, Any]:
            return {reason: {"count": len(numbers), "first_rows": numbers[:10]} for reason, numbers in rows.items()}

        return {**self.__dict__, "problems": brief(self.problems), "notes": brief(self.notes)}

    def lines(self) -> list[str]:
        """The report for a terminal, a line each."""
        joined = self.n_groups != self.n_rows
        lines = [
            f"source    {self.source}",
            f"format    {self.format}: {self.why}",
            f"rows      {self.n_rows:,}, {f'{self.n_groups:,} {self.counted}, ' * joined}usable {self.n_usable:,} "
            f"(numbered from 0{', a pair by its first row' * joined})",
        ]
        if self.template:
            lines.append(f"template  {self.template}")
        for head, found in (("left out", self.problems), ("noted", self.notes)):
            for reason, rows in found.items():
                first = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
                lines.append(f"{head:<9} {len(rows):,} {reason} (rows {first})")
        if self.labels:
            lines.append("labels    " + ", ".join(f"{count:,} {label}" for label, count in self.labels.items()))
        for name, stats in self.lengths.items():
            figures = ", ".join(f"{stat} {value:,.1f}" for stat, value in stats.items())
            lines.append(f"length    {name}: {figures}")
        for unit, counts in self.longer.items():
            share = f"{100 * self.chosen_longer(unit):.1f} %" if counts["chosen"] + counts["rejected"] else "none"
            lines.append(
                f"longer    the longer answer is the chosen one in {counts['chosen']:,} of "
                f"{counts['chosen'] + counts['rejected']:,} pairs ({share}) by {unit}; {counts['equal']:,} are equal"
            )
        return lines


def convert(
    rows: Sequence[Row], source: str = "rows", *, pairs: bool | None = None, template: str = "auto"
) -> tuple[list[Example], DataReport]:
    """Turn rows into examples, and report what was left out.

    Left out and counted: rows that lack a column or hold something that is not text; empty answers (nothing but white
    space); identical answers, which carry no preference (TRL keeps them). Duplicate prompts and duplicate rows stay and
    are counted. Nothing is repaired silently.

    Args:
        rows: as `load_rows` gives them.
        source: what the report and the errors call them.
        pairs: True wants pairs; False wants single completions, and takes the chosen answers of pairs; None takes what
            the rows are.
        template: "chat" makes messages of the turns of transcripts (`Format.messages`); otherwise strings stay as they
            are.

    Raises:
        UserError: unknown format, no pairs where they are wanted, or no usable row.
    """
    name = recognise(rows)
    known = FORMATS[name]
    if pairs and not known.pairs:
        raise UserError(
            f"{source}: expected preference pairs (columns chosen and rejected), found the format '{name}' with the "
            f"columns {', '.join(known.columns)}"
        )
    single = pairs is False and known.pairs
    why = "; ".join(
        [f"columns {', '.join(known.columns)}"]
        + [known.about] * bool(known.about)
        + ["the chosen answers are the completions"] * single
    )
    numbered = known.group(rows) if known.group else list(enumerate(rows))
    report = DataReport(str(source), name, why, n_rows=len(rows), n_groups=len(numbered))
    examples: list[Example] = []
    seen: set[str] = set()
    for number, row in numbered:
        try:
            parts = known.parts(row)
            if template == "chat" and known.messages:
                parts = known.messages(parts)
            answers = parts.answers[:1] if single else parts.answers
            check_answers(answers)
        except BadRow as reason:
            report.problems.setdefault(str(reason), []).append(number)
            continue
        except KeyError as column:
            report.problems.setdefault(f"no {column.args[0]}", []).append(number)
            continue
        for note in parts.notes:
            report.notes.setdefault(note, []).append(number)
        for what, key in (("duplicate prompt", parts.prompt), ("duplicate row", [parts.prompt, answers, parts.label])):
            text = what + json.dumps(key, sort_keys=True, default=str)
            if text in seen:
                report.notes.setdefault(what, []).append(number)
            seen.add(text)
        if parts.label is not None:
            label = str(parts.label).lower()
            report.labels[label] = report.labels.get(label, 0) + 1
        examples.append(Example(parts.prompt, answers, parts.label, parts.notes, number))
    report.n_usable = len(examples)
    check_usable(report)
    report.measure("characters", [[len(content(text)) for text in (e.prompt, *e.answers)] for e in examples])
    return examples, report


def check_usable(report: DataReport) -> None:
    """Raise a UserError with the reasons if a report has no usable row left."""
    if report.n_usable == 0:
        reasons = "; ".join(f"{len(rows):,} {reason}" for reason, rows in report.problems.items())
        raise UserError(f"{report.source}: none of the {report.n_rows:,} rows can be used: {reasons}")
