"""What a data file holds and what became of each of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from otpo.data.template import Choice, Rendering, one_line
from otpo.errors import UserError

PIECES = 24  # tokens of an example that are shown one by one


@dataclass
class DataReport:
    """What a data file holds and what became of each row.

    Attributes:
        source: the file or hub name. format: a name of FORMATS. why: what the format was known by.
        n_rows: rows read. n_groups: how many examples they could give: as many as rows, or fewer where a format joins
            rows, which then have the number of the first. n_usable: examples that they give.
        problems: reason -> numbers of the rows left out for it.
        notes: remark -> numbers of the rows it is true of; these rows are used.
        template: "chat" (the tokenizer's chat template), "literal" (strings as they are) or "chat and literal";
            `template_why` says why.
        chat_template_kwargs: variables that the chat template was given.
        lengths: "<part> <unit>" -> mean, median, p95, max, where the part is prompt, chosen, rejected or completion and
            the unit characters (of the usable rows' texts) or tokens (before truncation).
        labels: label -> number of examples, where they have one.
        longer: unit -> number of pairs whose "chosen" or "rejected" is longer, or which are of "equal" length.
        example: after tokenisation, the first usable row as training sees it: part -> its tokens, and its text with
            special tokens visible; "ends": the texts of its tokens that meet, a prompt's last and a completion's first.
        ignored: columns that hold something and are not read.
        shown: remark -> an example of it.
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
    template_why: str = ""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    lengths: dict[str, dict[str, float]] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    longer: dict[str, dict[str, int]] = field(default_factory=dict)
    example: dict[str, dict[str, Any]] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    shown: dict[str, str] = field(default_factory=dict)

    @property
    def counted(self) -> str:
        """What `n_groups` and `n_usable` count."""
        return "rows" if self.n_groups == self.n_rows else "pairs of rows"

    @property
    def choice(self) -> Choice:
        """The template of the rows, and why."""
        return Choice(self.template, self.template_why, self.chat_template_kwargs)

    @property
    def rendering(self) -> Rendering | str:
        """How all prompts were rendered; where they were rendered in two ways, the name of both."""
        return self.choice.for_generation if self.template in ("chat", "literal") else self.template

    def choose(self, choice: Choice) -> None:
        """Fill in the template."""
        self.template, self.template_why = choice.template, choice.why
        self.chat_template_kwargs = dict(choice.chat_template_kwargs)

    def show(self, tokenizer: Any, parts: dict[str, list[int]]) -> None:
        """Fill in `example` from the token ids of each part."""
        self.example = {
            part: {
                "tokens": len(ids),
                "text": tokenizer.decode(ids, clean_up_tokenization_spaces=False),
                "ends": [tokenizer.decode([id]) for id in (ids[-PIECES:] if part == "prompt" else ids[:PIECES])],
            }
            for part, ids in parts.items()
        }

    def measure(self, unit: str, lengths: Sequence[Sequence[int]] | np.ndarray) -> None:
        """Fill in `lengths` and `longer` from a sequence of lengths (prompt, completion, ...) for each example."""
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
        """Fraction of the pairs of different length in which the chosen completion is longer (nan if none)."""
        counts = self.longer[unit]
        unequal = counts["chosen"] + counts["rejected"]
        return counts["chosen"] / unequal if unequal else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: counts, and of all row numbers the first ten."""

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
        if self.ignored:
            lines.append(f"ignored   columns that are not read: {', '.join(self.ignored)}")
        if self.template:
            lines.append(f"template  {self.choice}")
        for head, found in (("left out", self.problems), ("noted", self.notes)):
            for reason, rows in found.items():
                first = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
                lines.append(f"{head:<9} {len(rows):,} {reason} (rows {first})")
                if reason in self.shown:
                    lines.append(f"{'':<9} for example {self.shown[reason]}")
        if self.labels:
            lines.append("labels    " + ", ".join(f"{count:,} {label}" for label, count in self.labels.items()))
        for name, stats in self.lengths.items():
            figures = ", ".join(f"{stat} {value:,.1f}" for stat, value in stats.items())
            lines.append(f"length    {name}: {figures}")
        for unit, counts in self.longer.items():
            share = f"{100 * self.chosen_longer(unit):.1f} %" if counts["chosen"] + counts["rejected"] else "none"
            lines.append(
                f"longer    the longer completion is the chosen one in {counts['chosen']:,} of "
                f"{counts['chosen'] + counts['rejected']:,} pairs ({share}) by {unit}; {counts['equal']:,} are equal"
            )
        for part, shown in self.example.items():
            lines.append(f"example   {part}, {shown['tokens']:,} tokens: {one_line(shown['text'])}")
        for part, shown in self.example.items():
            pieces, which = " | ".join(map(one_line, shown["ends"])), "last" if part == "prompt" else "first"
            lines.append(f"tokens    {part}, the {which} {len(shown['ends'])}: {pieces}")
        return lines


def check_usable(report: DataReport) -> None:
    """Raise a UserError with the reasons if a report has no usable row left."""
    if report.n_usable == 0:
        reasons = "; ".join(f"{len(rows):,} {reason}" for reason, rows in report.problems.items())
        raise UserError(f"{report.source}: none of the {report.n_rows:,} rows can be used: {reasons}")
