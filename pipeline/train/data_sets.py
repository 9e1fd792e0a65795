"""The data sets of a run: their rows become one file of token ids, shared out between training and validation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from otpo.data.report import DataReport
from otpo.data.sampler import held_out, shares, spread
from otpo.data.template import of_rows
from otpo.data.token_file import Item, TokenFile, load_tokens, save_tokens
from otpo.data.tokens import read_tokens
from otpo.errors import UserError
from otpo.training.objectives.reward import margins_of
from pipeline.progress import Progress
from pipeline.recipe import Recipe
from pipeline.recipe.rows import DataSet

SHOWN_FROM = 2**25  # bytes of a file from which tokenisation shows its progress
STRIDE = 2_000  # items between two calls of the progress


@dataclass(frozen=True)
class SetRows:
    """What became of one data set of a mix.

    Attributes:
        items: of the training file. taken: how many of them an epoch takes. held: of the validation file.
        first, end: its rows are numbered from `first` to before `end`.
    """

    name: str
    items: int
    taken: int
    held: int
    first: int
    end: int
    report: DataReport

    def times(self, factor: int) -> SetRows:
        """The set where each item has become several."""
        return replace(self, items=factor * self.items, taken=factor * self.taken, held=factor * self.held)

    def __str__(self) -> str:
        again = f" of {self.items:,}" if self.taken != self.items else ""
        rows = f"rows {self.first:,} to {self.end - 1:,} of the mix"
        return f"; an epoch takes {self.taken:,}{again}, {self.held:,} held out ({rows})"


@dataclass
class Tokenised:
    """The items of all data sets, one set after the other.

    Attributes:
        items: their rows are numbered through over all sets.
        sets: (n,) the number of each item's data set. held: (n,) whether it is held out.
        firsts: of each set, the number of its first row.
    """

    items: TokenFile
    reports: list[DataReport]
    sets: np.ndarray
    held: np.ndarray
    firsts: list[int]

    def side(self, held: bool) -> Iterator[Item]:
        """The items of the validation side, or of the training side, in order."""
        return (self.items[index] for index in np.flatnonzero(self.held == held))


def tokenise_sets(
    recipe: Recipe,
    sets: Sequence[DataSet],
    tokenizer: PreTrainedTokenizerBase,
    work: Path,
    *,
    pairs: bool,
    supervised: bool,
    kwargs: Mapping[str, Any],
    progress: Progress,
) -> Tokenised:
    """Tokenise the data sets into files of a folder, take of each what a mix needs, and choose what is held out.

    Args:
        kwargs: variables of the chat template.

    Raises:
        UserError: rows that cannot be used.
    """
    data = recipe.data
    reports: list[DataReport] = []
    firsts = [0]

    def items() -> Iterator[Item]:
        for each in sets:
            found, report = read_tokens(
                each.rows, tokenizer, pairs=pairs, good=supervised, template=data.template, max_length=data.max_length,
                max_prompt_length=data.max_prompt_length, truncation=data.truncation, columns=each.columns,
                chat_template_kwargs=kwargs, rewritten=data.rewritten, source=each.source,
            )  # fmt: skip
            reports.append(report)
            for item in _shown(found, report, each, progress):
                yield replace(item, row=item.row + firsts[-1])
            firsts.append(firsts[-1] + report.n_rows)

    save_tokens(work / "all.safetensors", items())
    found = load_tokens(work / "all.safetensors")
    sizes = [report.n_usable for report in reports]
    numbers = np.repeat(np.arange(len(sets)), sizes)
    fractions = _fractions(recipe) if len(sets) > 1 else None
    if fractions and data.stopping_strategy == "first_exhausted":
        counts = shares(sizes, fractions, repeat=False)
        starts = np.cumsum([0, *sizes])
        kept = np.concatenate([start + spread(*pair) for start, *pair in zip(starts, sizes, counts, strict=False)])
        save_tokens(work / "kept.safetensors", (found[index] for index in kept))
        found, numbers = load_tokens(work / "kept.safetensors"), numbers[kept]
    held = np.zeros(len(found), dtype=bool)
    if data.validation and not supervised:
        fraction, count = (data.validation, None) if data.validation < 1 else (None, int(data.validation))
        held = held_out(found.prompts(), fraction=fraction, count=count, seed=recipe.train.seed, sets=numbers)
    return Tokenised(found, reports, numbers, held, firsts)


def _fractions(recipe: Recipe) -> list[float] | None:
    fractions = [each.fraction for each in recipe.data.datasets.values() if each.fraction is not None]
    return fractions or None


def _shown(items: Iterator[Item], report: DataReport, each: DataSet, progress: Progress) -> Iterator[Item]:
    """The items as they come; progress of long work is told."""
    path = Path(each.source).expanduser()
    if path.is_file() and path.stat().st_size < SHOWN_FROM:
        yield from items
        return
    total, what = each.rows.count(), f"tokenise {path.name}"
    for number, item in enumerate(items):
        if number % STRIDE == 0:
            progress(what, report.n_rows, total, "")
        yield item
    progress(what, total, total, "")


def set_rows(recipe: Recipe, sets: Sequence[DataSet], found: Tokenised) -> tuple[SetRows, ...]:
    """The data sets of a mix; nothing for a single source.

    Raises:
        UserError: nothing of a set is left to train on.
    """
    if len(sets) == 1 and not sets[0].name:
        return ()
    items = np.bincount(found.sets[~found.held], minlength=len(sets)).tolist()
    held = np.bincount(found.sets[found.held], minlength=len(sets)).tolist()
    for each, count in zip(sets, items, strict=True):
        if not count:
            raise UserError(
                f"data.datasets.{each.name}: no row is left to train on: lower data.validation, or give the set a"
                " larger fraction"
            )
    taken, fractions = items, _fractions(recipe)
    if fractions and recipe.data.stopping_strategy == "all_exhausted":
        taken = shares(items, fractions, repeat=True)
    return tuple(
        SetRows(each.name, items[i], taken[i], held[i], found.firsts[i], found.firsts[i + 1], found.reports[i])
        for i, each in enumerate(sets)
    )


def report_of(found: Tokenised, sets: Sequence[DataSet], template: str) -> DataReport:
    """The report of a single source, or one that counts what the reports of a mix count."""
    first, *others = found.reports
    if not others:
        return first
    whole = DataReport(
        ", ".join(each.source for each in sets),
        ", ".join(dict.fromkeys(each.format for each in sets)),
        f"a mix of {len(sets)} data sets",
        n_rows=sum(report.n_rows for report in found.reports),
        n_groups=sum(report.n_groups for report in found.reports),
        n_usable=sum(report.n_usable for report in found.reports),
        example=first.example,
    )
    for each, report, start in zip(sets, found.reports, found.firsts, strict=False):
        whole.problems |= {
            f"{each.name}: {why}": [row + start for row in rows] for why, rows in report.problems.items()
        }
        whole.notes |= {f"{each.name}: {why}": [row + start for row in rows] for why, rows in report.notes.items()}
        whole.shown |= {f"{each.name}: {remark}": example for remark, example in report.shown.items()}
        for label, count in report.labels.items():
            whole.labels[label] = whole.labels.get(label, 0) + count
        for unit, counts in report.longer.items():
            totals = whole.longer.setdefault(unit, dict.fromkeys(counts, 0))
            whole.longer[unit] = {side: totals[side] + count for side, count in counts.items()}
    kwargs = {name: value for report in found.reports for name, value in report.chat_template_kwargs.items()}
    whole.choose(of_rows(template, {name for r in found.reports for name in r.template.split(" and ")}, kwargs))
    return whole


def margins_of_sets(sets: Sequence[DataSet], found: Tokenised) -> dict[int, float] | None:
    """The margins of the pairs of all data sets, by the number of their row; None where no row has one.

    Raises:
        UserError: some pairs have one and others do not.
    """
    margins: dict[str, dict[int, float] | None] = {}
    for number, each in enumerate(sets):
        first = found.firsts[number]
        rows = (found.items.rows[found.sets == number] - first).tolist()
        of_set = margins_of(each.rows, rows, each.source)
        margins[each.name] = None if of_set is None else {row + first: margin for row, margin in of_set.items()}
    having = [name for name, of_set in margins.items() if of_set is not None]
    if having and len(having) < len(sets):
        lacking = next(name for name, of_set in margins.items() if of_set is None)
        raise UserError(
            f"data.datasets: the rows of {having[0]} have a `margin` and those of {lacking} have none. Every pair of a"
            " reward model needs a finite margin, or none of them may have that column."
        )
    return {row: m for of_set in margins.values() if of_set for row, m in of_set.items()} if having else None
