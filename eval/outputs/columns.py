"""Which column of a file of outputs is what: told by names and cells, or said by `judge.columns`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from otpo.data.formats.cells import are_messages, is_null
from otpo.data.formats.names import ALIASES, CONVERSATIONS, HINTS, TEXTS, plain
from otpo.errors import UserError
from otpo.files import Row

NAMES: dict[str, tuple[str, ...]] = {
    "instruction": ("instruction", *TEXTS),
    "output": (*ALIASES["output"], "prediction", "generation", "generated_text", "model_output", "model_response"),
    "generator": ("generator", "model", "model_name", "model_id"),
    "input": ("input",),
    "dataset": ("dataset",),
    "n_tokens": ("n_tokens",),
    "truncated": ("truncated",),
}
"""What a column can be -> the names that it may have in a file, without regard to capitals; the first is ours."""

Columns = Mapping[str, str | None]
"""`judge.columns`: what a column is -> its name in the file; a name in the file -> None leaves the column out."""

_HINTS = {"instruction": "prompt", "output": "completion"}


@dataclass(frozen=True)
class OutputColumns:
    """Which columns of a file are read.

    Attributes:
        names: what a column is (a key of NAMES) -> its name in the file.
        conversation: a column of messages that holds the instruction, the output or both, where no other column does.
        left_out: columns that `judge.columns` leaves out.
        there: all columns of the file.
        written: of instruction and output, those that are messages as text in all rows, as CSV keeps them.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    conversation: str | None = None
    left_out: tuple[str, ...] = ()
    there: tuple[str, ...] = ()
    written: frozenset[str] = frozenset()

    @property
    def plain(self) -> bool:
        """Whether every column is named as here, and nothing is left out."""
        return all(what == name for what, name in self.names.items()) and not self.left_out

    @property
    def said(self) -> str:
        """What is not obvious about them; empty where everything is named as AlpacaEval names it."""
        parts = [f"{what} is the column {name}" for what, name in self.names.items() if what != name]
        if self.conversation:
            wanted = " and ".join(what for what in ("instruction", "output") if what not in self.names)
            parts.append(f"{wanted} {'are' if ' and ' in wanted else 'is'} of the messages in {self.conversation}")
        parts += [f"{name} is left out" for name in self.left_out]
        return ", ".join(parts)

    def renamed(self, row: Row) -> Row:
        """A row with our names of its columns, and every other column as it is."""
        if self.plain:
            return row
        gone = {*self.names.values(), *self.left_out, *self.names}
        rest = {column: value for column, value in row.items() if column not in gone}
        return rest | {what: row[name] for what, name in self.names.items() if name in row}


def find_columns(
    rows: Sequence[Row], source: str, columns: Columns | None = None, *, reference: bool = False
) -> OutputColumns:
    """Which column of a file is what.

    A name of AlpacaEval's wins, then the other names in NAMES. Of AlpacaEval's annotations, which hold two outputs, the
    reference's are `output_1` and the model's `output_2`.

    Args:
        rows: of the file.
        source: what errors call it.
        columns: `judge.columns`; what it says of columns that the file does not have is ignored (`check_used`).
        reference: whether the file is read as the reference's.

    Raises:
        UserError: no column, or several, may be the instruction or the output; the message says a mapping. Or
            `columns` names what a column cannot be.
    """
    if unknown := [what for what, name in (columns or {}).items() if name is not None and what not in NAMES]:
        raise UserError(
            f"judge.columns: '{unknown[0]}' is nothing that a column of outputs can be: expected {', '.join(NAMES)}"
        )
    filled: dict[str, bool] = {}
    for row in rows:
        for column, cell in row.items():
            filled[column] = filled.get(column, False) or not is_null(cell)
    asked = {what: name for what, name in (columns or {}).items() if (what if name is None else name) in filled}
    left_out = tuple(what for what, name in asked.items() if name is None)
    names = {what: name for what, name in asked.items() if name is not None}
    for what in NAMES:
        if what not in names:
            free = [column for column in filled if column not in {*names.values(), *left_out}]
            found = _named(what, free, filled, rows, source)
            if what == "output" and found is None:
                found = _of_annotations(free, reference)
            if what == "generator":
                beside = f"generator_{names.get('output', '')[-1:]}"  # of `output_2`, generator_2
                found = beside if beside in free else found
            names |= {what: found} if found is not None else {}
    conversation = None
    if not {"instruction", "output"} <= names.keys():
        conversation = next((column for column in filled if filled[column] and plain(column) in CONVERSATIONS), None)
    if conversation is None:
        for what in ("instruction", "output"):
            if what not in names:
                raise _not_there(what, [column for column in filled if column not in names.values()], rows, source)
    written = {what for what in _HINTS if what in names and _are_messages([row.get(names[what]) for row in rows])}
    return OutputColumns(names, conversation, left_out, tuple(filled), frozenset(written))


def check_used(columns: Columns, files: Sequence[OutputColumns]) -> None:
    """Refuse `judge.columns` that name a column which none of the files has.

    Raises:
        UserError: with the columns that there are.
    """
    there = list(dict.fromkeys(column for file in files for column in file.there))
    for what, name in columns.items():
        if (what if name is None else name) not in there:
            raise UserError(f"judge.columns: no file has a column {name or what}; there are {listed(there)}")


def way(what: str, column: str) -> str:
    """The mapping that an error proposes."""
    return f"judge.columns: {{{what}: {column}}}"


def _named(what: str, free: Sequence[str], filled: Mapping[str, bool], rows: Sequence[Row], source: str) -> str | None:
    """The one column with a name of what is looked for. A name counts only where a row says something under it."""
    known = [column for column in free if filled[column] and plain(column) in NAMES[what]]
    known.sort(key=lambda column: (column != what, plain(column) != what))  # the sort is stable
    if not known:
        return what if what in free else None
    first, *others = known
    for other in others if what in _HINTS and plain(first) != what else ():
        if any(row.get(other) != row.get(first) for row in rows):
            raise UserError(
                f"{source}: expected one column that is the {what}, found {', '.join(known)}. Say which it is: "
                f"{way(what, first)} or {way(what, other)}."
            )
    return first


def _are_messages(cells: Sequence[object]) -> bool:
    texts = [cell for cell in cells if isinstance(cell, str) and cell.strip()]
    return bool(texts) and all(map(are_messages, texts))


def _of_annotations(free: Sequence[str], reference: bool) -> str | None:
    return ("output_1" if reference else "output_2") if {"output_1", "output_2"} <= {*free} else None


def _not_there(what: str, free: Sequence[str], rows: Sequence[Row], source: str) -> UserError:
    texts = [column for column in free if any(_is_prose(row.get(column)) for row in rows)]
    likely = next((column for hint in HINTS[_HINTS[what]] for column in texts if hint in plain(column)), None)
    there = listed(list(dict.fromkeys(column for row in rows for column in row)))
    needed = " Outputs belong to the reference by their instructions: write these into the file." * (not texts)
    return UserError(
        f"{source}: no column is the {what}; there are {there}. Say which one is: "
        f"{way(what, likely or (texts[0] if texts else 'COLUMN'))}.{needed}"
    )


def _is_prose(cell: object) -> bool:
    return isinstance(cell, str) and len(cell.split()) > 1


def listed(columns: Sequence[str]) -> str:
    """The names of columns in one line of an error, the first twelve."""
    more = f" and {len(columns) - 12} more" if len(columns) > 12 else ""
    return f"{', '.join(' '.join(column.split())[:40] for column in columns[:12]) or 'none'}{more}"
