"""Rows of any known format become examples, still text, with a report of what was left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from otpo.data.formats import FORMATS, recognise
from otpo.data.report import DataReport, check_usable
from otpo.data.rows import BadRow, Example, check_completions, content
from otpo.data.template import of_rows, template_of
from otpo.errors import UserError
from otpo.files import Row


def convert(
    rows: Sequence[Row], source: str | Path = "rows", *, pairs: bool | None = None, template: str = "auto"
) -> tuple[list[Example], DataReport]:
    """Turn rows into examples, and report what was left out.

    Left out and counted: rows that lack a column or hold something that is not text; empty completions (nothing but
    white space); identical completions, which carry no preference (TRL keeps them). Duplicate prompts and duplicate
    rows stay and are counted. Nothing is repaired silently.

    Args:
        rows: as `load_rows` gives them.
        source: what the report and the errors call them.
        pairs: True wants pairs; False wants single completions, and takes the chosen ones of pairs; None takes what the
            rows are.
        template: a value of `data.template`. "chat" makes messages of the turns of transcripts (`Format.messages`);
            otherwise strings stay as they are.

    Raises:
        UserError: unknown format, no pairs where they are wanted, messages for a literal template, or no usable row.
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
        + ["the chosen completions are taken"] * single
    )
    numbered = known.group(rows) if known.group else list(enumerate(rows))
    report = DataReport(str(source), name, why, n_rows=len(rows), n_groups=len(numbered))
    examples: list[Example] = []
    templates: set[str] = set()
    seen: set[str] = set()
    for number, row in numbered:
        try:
            parts = known.read(row)
            if template == "chat" and known.messages:
                parts = known.messages(parts)
            completions = parts.completions[:1] if single else parts.completions
            check_completions(completions)
        except BadRow as reason:
            report.problems.setdefault(str(reason), []).append(number)
            continue
        except KeyError as column:
            report.problems.setdefault(f"no {column.args[0]}", []).append(number)
            continue
        templates.add(template_of(template, (parts.prompt, *completions), f"{source}: row {number}"))
        for note in parts.notes:
            report.notes.setdefault(note, []).append(number)
        whole = [parts.prompt, completions, parts.label]
        for what, key in (("duplicate prompt", parts.prompt), ("duplicate row", whole)):
            text = what + json.dumps(key, sort_keys=True, default=str)
            if text in seen:
                report.notes.setdefault(what, []).append(number)
            seen.add(text)
        if parts.label is not None:
            label = str(parts.label).lower()
            report.labels[label] = report.labels.get(label, 0) + 1
        examples.append(Example(parts.prompt, completions, parts.label, parts.notes, number))
    report.n_usable = len(examples)
    check_usable(report)
    report.choose(of_rows(template, templates))
    report.measure("characters", [[len(content(text)) for text in (e.prompt, *e.completions)] for e in examples])
    return examples, report
