"""How the rows of a file are read: its format, which column is what, and what the format itself does not know of.

Decided once, from the columns and a sample of rows; then each row is read alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from otpo.data.formats import FORMATS, Format
from otpo.data.formats.beside import check_dropped, check_sides, dropped, kind_of, way
from otpo.data.formats.cells import are_messages, are_texts, is_blank, is_null, string_of
from otpo.data.formats.columns import score_notes
from otpo.data.formats.context import context_of, joined, last_role
from otpo.data.formats.names import ALIASES, CONTEXT, CONVERSATIONS, HALF, HINTS, TEXTS, plain, scores_among
from otpo.data.formats.sample import check_decisions, is_prose, may_be_text, prose_of
from otpo.data.formats.turned import check_turned
from otpo.data.rows import BadRow, Parts, Row, content
from otpo.errors import UserError

SAMPLE = 1000  # rows, evenly spread, that tell a format
Columns = Mapping[str, str | None]
"""`data.columns`: what a column is -> its name in the file; a name in the file -> None leaves the column out."""


@dataclass(frozen=True)
class Reading:
    """How the rows of a file are read.

    Attributes:
        name: of the format in FORMATS.
        names: a column as the format calls it -> as the file does, where they differ.
        left_out: columns that `data.columns` leaves out.
        context: what belongs to the prompt in every format (system, tools, ...) -> its column in the file.
        joined: a column that stands in the prompt after a blank line.
        ignored: columns that hold something and are not read.
        prose: columns of text, in which messages as text are the exception; such rows are left out.
        scores: columns with the scores of chosen and rejected, which change nothing but are compared with the choice.
        taken: columns that are read, or that `data.columns` decides against; empty while the format is being told.
    """

    name: str
    names: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    context: Mapping[str, str] = field(default_factory=dict)
    joined: str | None = None
    ignored: tuple[str, ...] = ()
    prose: tuple[str, ...] = ()
    scores: tuple[str, str] | None = None
    taken: frozenset[str] = frozenset()

    @property
    def format(self) -> Format:
        """The format."""
        return FORMATS[self.name]

    @property
    def why(self) -> str:
        """The columns that are read, each as the format calls it."""
        own = [column for column in self.format.also if column in self.names]
        columns = [_named(column, self.names.get(column, column)) for column in (*self.format.columns, *own)]
        beside = [_named(column, name) for column, name in self.context.items()]
        beside += [f"{self.joined} after a blank line of the prompt"] * bool(self.joined)
        return f"columns {', '.join(columns)}" + f"; with {', '.join(beside)}" * bool(beside)

    def renamed(self, row: Row) -> Row:
        """A row with the format's names of its columns."""
        if not self.names and not self.left_out:
            return row
        taken = {*self.names.values(), *self.left_out}
        rest = {column: value for column, value in row.items() if column not in taken and column not in self.names}
        return rest | {column: row.get(name) for column, name in self.names.items()}

    def parts(self, row: Row, template: str = "auto") -> Parts:
        """The prompt and completions of a renamed row (of joined rows in a format that joins them).

        Args:
            template: a value of `data.template`. "chat" makes messages of a transcript's turns.

        Raises:
            BadRow: the row cannot be used; the message says why.
        """
        parts = self.format.read(row)
        rows = row["rows"] if self.format.group else [row]
        if self.names.get("prompt") in CONVERSATIONS and last_role(parts.prompt) == "assistant":
            raise BadRow(f"{self.names['prompt']} ends in a message of the assistant, and the completions follow it")
        if self.joined and not is_blank(rows[0].get(self.joined)):
            parts = joined(parts, string_of(rows[0], self.joined))
        if mixed := next((column for column in self.prose if are_messages(rows[0].get(column))), None):
            raise BadRow(f"{mixed} is messages as text, and plain text in most rows (or in the other completion)")
        for each in rows if self.taken else ():
            check_dropped(each, self.taken, parts)
            check_sides(each, parts)
        if self.scores and self.taken:
            parts = replace(parts, notes=parts.notes + score_notes(rows[0], *self.scores))
        beside = context_of(rows[0], self.context)
        if self.format.messages and (template == "chat" or beside):
            parts = self.format.messages(parts)
        if beside or (self.context and template != "literal"):
            parts = beside.before(parts)
        return parts


def recognise(rows: Sequence[Row], columns: Columns | None = None) -> str:
    """The name of the rows' format: the first of FORMATS that at least half of them fit. Raises as `reading_of`."""
    return reading_of(rows, columns).name


def reading_of(rows: Sequence[Row], columns: Columns | None = None, source: str = "rows") -> Reading:
    """How rows are to be read, from the columns and a sample of them.

    Args:
        columns: `data.columns`. source: what errors call the rows.

    Raises:
        UserError: no format fits, a mapping that cannot be, or columns that would be dropped although they carry
            meaning; the message lists the columns and says a mapping that would read them.
    """
    sample = [rows[index * len(rows) // min(len(rows), SAMPLE)] for index in range(min(len(rows), SAMPLE))]
    found = {str(column): None for row in rows for column in row}
    mapped, left_out = _mapping(columns or {}, found, source)
    asked = Reading("", names=mapped, left_out=left_out)
    sample = [{k: None if is_null(v) else v for k, v in asked.renamed(row).items()} for row in sample]
    filled = dict.fromkeys(found, 0)
    for row in rows:
        for column, value in row.items():
            filled[str(column)] += not is_blank(value)
    counts = {column: count or 0 for column, count in asked.renamed(filled).items()}
    for name, known in FORMATS.items():
        names = _names(known, counts, len(rows))
        if names is None:
            continue
        renamed = [Reading("", names=names).renamed(row) for row in sample]
        if 2 * sum(map(known.fits, renamed)) >= max(len(sample), 1):
            reading = _complete(Reading(name, names=names), renamed, counts, asked, source)
            unread = () if known.pairs else reading.ignored
            check_decisions(known.columns, reading.names, rows, source, unread)
            check_turned(known.columns, reading.names, rows, source, reading.ignored)
            return reading
    raise _unknown(list(found), sample, source)


def _mapping(columns: Columns, found: Mapping[str, None], source: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """`data.columns` as (what a column is -> its name in the file, the columns to leave out)."""
    known = {*ALIASES, *CONTEXT, "margin", *(column for each in FORMATS.values() for column in each.columns)}
    for what, name in columns.items():
        column = what if name is None else name
        if found and column not in found:
            raise UserError(f"data.columns: {source} has no column {column}; it has {', '.join(found)}")
        if name is not None and what not in known:
            raise UserError(
                f"data.columns: '{what}' is nothing that a column can be: expected {', '.join(sorted(known))}"
            )
    mapped = {what: name for what, name in columns.items() if name is not None}
    return mapped, tuple(what for what, name in columns.items() if name is None)


def _names(known: Format, counts: Mapping[str, int], rows: int) -> dict[str, str] | None:
    """The names that a format's columns have here, where they have others; None where one is not there."""
    names: dict[str, str] = {}
    for column in known.columns:
        if counts.get(column):
            continue
        aliases = ALIASES.get(column, ()) if known.renamed else ()
        if known.pairs and column == "prompt":
            aliases = (*aliases, *CONVERSATIONS)
        other = next((name for name in aliases if 2 * counts.get(name, 0) >= max(rows, 1)), None)
        if other is not None:
            names[column] = other
        elif column not in counts:
            return None
    for column in known.also if known.renamed else ():
        aliases = (*ALIASES[column], "instruction") if column == "prompt" else ALIASES[column]
        other = next((name for name in aliases if counts.get(name) and name not in names.values()), None)
        if other not in (None, column):
            names[column] = str(other)
    return names


# ---- what a format itself does not know of ----


def _complete(
    reading: Reading, sample: Sequence[Row], counts: Mapping[str, int], asked: Reading, source: str
) -> Reading:
    """Find the columns beside those of the format, and refuse those that would be dropped although they say something.

    Args:
        sample: renamed rows. counts: column as `data.columns` names it -> rows in which it says something.
        asked: `data.columns` as a reading.
    """
    known = reading.format
    filled = [column for column, count in counts.items() if count]
    spelled = {plain(column): column for column in (*reversed(filled), *asked.names)}
    context = {
        what: next(spelled[name] for name in names if name in spelled)
        for what, names in CONTEXT.items()
        if any(name in spelled and (name not in known.columns or what == "tools") for name in names)
    }
    taken = {*known.columns, *known.also, *reading.names.values(), *context.values(), "margin"}
    rest = [column for column in filled if column not in taken]
    after = (
        ("input", "context") if reading.names.get("prompt") == "instruction" else ("input",) * ("input" in asked.names)
    )
    beside = next((column for column in after if column in rest), None)
    rest = [column for column in rest if column != beside]
    reading = replace(reading, context=context, joined=beside)
    if media := [column for column in rest if kind_of(column) == "media"]:
        raise UserError(
            f"{source}: the column {media[0]} holds something, and only text can be trained on. Take rows without it,"
            f" or leave it out: {way(media[0], None)}."
        )
    prompts = [row.get("prompt") for row in sample if not is_blank(row.get("prompt"))]
    if "winner_model_a" not in known.columns and 2 * sum(map(are_texts, prompts)) > len(prompts):
        raise UserError(
            f"{source}: the column {reading.names.get('prompt', 'prompt')} holds lists of texts, such as the questions"
            " of a conversation. Write them as messages (role and content), together with the answers between them."
        )
    parts = list(_readable(reading, sample))
    if reading.name == "preference-implicit" and all(isinstance(each.prompt, str) for _, each in parts):
        _check_implicit(rest, sample, [content(each.prompt) for _, each in parts], source)
    taken |= {column for column in (*rest, *counts) if kind_of(column) in asked.names}
    taken |= {beside} if beside else set()
    _check_beside(reading, rest, frozenset(taken), parts, source)
    return replace(
        reading,
        names={**asked.names, **{column: asked.names.get(name, name) for column, name in reading.names.items()}},
        left_out=asked.left_out,
        ignored=tuple(column for column in rest if not _repeats(reading, column)),
        prose=prose_of(known.columns, sample),
        scores=scores_among(rest)
        if {"chosen", "rejected"} <= {*known.columns} - {*reading.names, *asked.names}
        else None,
        taken=frozenset(taken),
    )


def _repeats(reading: Reading, column: str) -> bool:
    """Whether a column should say again what prompt and completions say; a row in which it does not is left out."""
    return kind_of(column) == "messages" or (column == "prompt" and "messages" in reading.format.columns)


def _readable(reading: Reading, sample: Sequence[Row]) -> Iterable[tuple[Row, Parts]]:
    numbered = reading.format.group(sample) if reading.format.group else enumerate(sample)
    for _, row in numbered:
        try:
            yield row["rows"][0] if reading.format.group else row, reading.parts(row)
        except (BadRow, KeyError):
            continue


def _check_implicit(rest: Sequence[str], sample: Sequence[Row], prompts: Sequence[str], source: str) -> None:
    """Refuse to take what two strings happen to begin with for the prompt where a column may be it, or nothing is."""
    texts = [column for column in rest if is_prose([row.get(column) for row in sample])]
    empty = sum(not prompt.strip() for prompt in prompts)
    if texts:
        ways = " or ".join(way("prompt", column) for column in texts[:3])
        raise UserError(
            f"{source}: expected to know which column is the prompt, found the columns chosen, rejected,"
            f" {', '.join(rest)}. Say it: {ways}. {way(texts[0], None)} leaves a column out; without any, the prompt is"
            " what chosen and rejected begin with."
        )
    if prompts and 2 * empty > len(prompts):
        raise UserError(
            f"{source}: expected a column prompt, or chosen and rejected that both begin with the prompt; found the"
            f" columns chosen, rejected{', '.join(['', *rest])}, which begin alike in {len(prompts) - empty} of"
            f" {len(prompts)} rows. Add a column prompt (an empty one trains without a prompt), or say which it is:"
            f" {way('prompt', rest[0] if rest else 'COLUMN')}."
        )


def _check_beside(
    reading: Reading, rest: Sequence[str], taken: frozenset[str], parts: Sequence[tuple[Row, Parts]], source: str
) -> None:
    """Refuse columns that usually belong to prompt or answer, or may be it, and would be dropped."""
    missing = [(column, row[column]) for row, each in parts for column in _dropped(row, taken, each)]
    for column in [column for column in rest if kind_of(column) and not _repeats(reading, column)]:
        kind, cells = kind_of(column), [cell for name, cell in missing if name == column]
        if not cells:
            continue
        if kind == "prompt" or kind in reading.context:
            one = reading.names.get(kind, kind) if kind == "prompt" else reading.context[kind]
            if one == "prompt" and "instruction" in reading.format.columns:
                one = "instruction"
            raise _which(kind, one, column, source)
        who = "answers do" if kind == "thoughts" else "prompt does"
        text = f" {way('input', column)} puts it after the prompt and a blank line;" * (kind == "beside")
        raise UserError(
            f"{source}: the column {column} says something that the {who} not, in {len(cells)} of {len(parts)} rows."
            f"{text * all(isinstance(cell, str) for cell in cells)} {way(column, None)} leaves it out."
        )
    for what, one in reading.names.items():
        if others := [other for other in rest if other in ALIASES.get(what, ()) and other not in TEXTS]:
            raise _which(what, one, others[0], source)


def _dropped(row: Row, taken: frozenset[str], parts: Parts) -> list[str]:
    try:
        return list(dropped(row, taken, parts))
    except BadRow:
        return []


def _which(what: str, one: str, other: str, source: str) -> UserError:
    return UserError(
        f"{source}: expected one column that is the {what}, found {one}, {other}. Say which it is: {way(what, one)} or"
        f" {way(what, other)}."
    )


# ---- errors ----


def _named(column: str, name: str) -> str:
    return column if column == name else f"{column} ({name})"


def _unknown(found: Sequence[str], sample: Sequence[Row], source: str) -> UserError:
    formats = "; ".join(f"{name}: {', '.join(known.columns)}" for name, known in FORMATS.items())
    proposed = _proposed([column for column in found if any(may_be_text(row.get(column)) for row in sample)])
    way = " Say which column is what by data.columns: {prompt: COLUMN, chosen: COLUMN, rejected: COLUMN}, or {prompt:"
    way += (
        " COLUMN, completion: COLUMN}; of two responses whose better one differs from row to row, write it as chosen."
    )
    if spaced := [column for column in found if column != column.strip()]:
        way = f" White space belongs to the names {', '.join(map(repr, spaced))}: take it out of the header."
    elif proposed:
        way = f" Say which column is what, for example data.columns: {{{proposed}}}."
    return UserError(
        f"{source}: no known format has the columns {', '.join(found) or '(none)'}.{way} Known formats: {formats}"
    )


def _proposed(columns: Sequence[str]) -> str:
    """A mapping that would read these columns, by their names; else in the order in which they stand."""
    roles: dict[str, str] = {}
    for role, hints in HINTS.items():
        for column in columns:
            if column not in roles.values() and any(hint in column.lower() for hint in hints):
                roles.setdefault(role, column)
    if len([column for column in columns if HALF.search(column)]) > 1 and not {"chosen", "rejected"} <= set(columns):
        return ""  # two responses, and which is the better one differs from row to row
    free = [column for column in columns if column not in roles.values()]
    wanted = ("prompt", "chosen", "rejected") if {"chosen", "rejected"} & roles.keys() else ("prompt", "completion")
    for role in wanted:
        if role not in roles and free:
            roles[role] = free.pop(0)
    return ", ".join(f"{role}: {roles[role]}" for role in wanted) if set(wanted) <= roles.keys() else ""
