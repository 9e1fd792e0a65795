"""What the cells of a sample of rows tell about their columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from otpo.data.formats.beside import way_by_number, way_by_truth
from otpo.data.formats.cells import are_messages, is_blank, is_null
from otpo.data.formats.names import ALIASES
from otpo.data.rows import Row
from otpo.errors import UserError


def is_prose(cells: Sequence[Any]) -> bool:
    """Whether cells are texts of several words, most of them different: no names and no numbers."""
    texts = [cell.strip() for cell in cells if isinstance(cell, str) and not is_blank(cell)]
    words = sum(len(text.split()) > 1 for text in texts)
    return 2 * words > len(texts) and 2 * len(set(texts)) > len(texts)


def may_be_text(cell: Any) -> bool:
    """Whether a cell may be read as a prompt or a completion: text, or a list of objects."""
    return isinstance(cell, str) or (isinstance(cell, list) and all(isinstance(each, dict) for each in cell))


def prose_of(columns: Sequence[str], sample: Sequence[Row]) -> tuple[str, ...]:
    """The columns in whose texts messages as text are no majority; chosen and rejected are of one kind."""
    groups = [("chosen", "rejected"), *((c,) for c in columns if c not in ("chosen", "rejected", "messages"))]
    found: list[str] = []
    for group in groups:
        texts = [row[column] for row in sample for column in group if isinstance(row.get(column), str)]
        if 2 * sum(map(are_messages, texts)) <= len(texts):
            found += [column for column in group if column in columns]
    return tuple(found)


def check_decisions(
    columns: Sequence[str], names: Mapping[str, str], rows: Sequence[Row], source: str, unread: Sequence[str] = ()
) -> None:
    """Refuse labels and winners that are numbers of which it is not clear what they say.

    Args:
        columns: of the format. names: a column as the format calls it -> as the file does, where they differ.
        unread: columns beside single completions, among which labels of a scale may be: too few of them are true or
            false for a format with a label.
    """
    for label in ["label"] if "label" in columns else [name for name in unread if name in ALIASES["label"]]:
        _check_labels([row.get(names.get(label, label)) for row in rows], label, source)
    decides = next((column for column in ("winner", "better_response_id", "preference") if column in columns), None)
    if decides is not None and columns[1].startswith(("response_", "output_")):
        column, first, second = (names.get(each, each) for each in (decides, *columns[1:3]))
        _check_winners([row.get(column) for row in rows], columns, (names.get(columns[0], columns[0]), first, second),
                       column, source)  # fmt: skip


def _check_winners(
    cells: Sequence[Any], columns: Sequence[str], texts: tuple[str, str, str], column: str, source: str
) -> None:
    """1 and 2 are the first and the second response, 0 and 1 only where the responses are numbered so."""
    words = {str(cell).strip().lower() for cell in cells if not is_blank(cell)}
    numbers = _numbers(words)
    counted = {0.0, 1.0} if "response_0" in columns else {1.0, 2.0}
    both = numbers == counted or "response_a" not in columns
    if (numbers and not (numbers <= counted and both)) or words & {"true", "false"}:
        prompt, first, second = texts
        said = sorted(words & {"true", "false"})
        found = ", ".join([*(f"{number:g}" for number in sorted(numbers)[:6]), *said])
        ways = []
        if numbers <= {0, 1}:
            ways.append(way_by_truth(column, prompt, first, second))
            if not said:
                ways.append(way_by_number(column, prompt, first, second))
        raise UserError(
            f"{source}: expected that {column} names the better of {first} and {second} (a or b, model_a, ...), or"
            f" counts them as 1 and 2; found {found}, which can be read in several ways."
            f" {' '.join([*ways, 'Otherwise write a, b and tie.'])}"
        )


def _numbers(words: Iterable[str]) -> set[float]:
    numbers = set()
    for word in words:
        try:
            numbers.add(float(word))
        except ValueError:
            continue
    return {number for number in numbers if not is_null(number)}


def _check_labels(cells: Sequence[Any], column: str, source: str) -> None:
    """Refuse labels that are numbers of a scale, of which 1 need not be good and 0 need not be bad."""
    numbers = _numbers(map(str, cells))
    if numbers - {-1, 0, 1} or {-1, 0} <= numbers:
        some = ", ".join(f"{number:g}" for number in sorted(numbers)[:6])
        raise UserError(
            f"{source}: expected labels that say whether a completion is good, found the numbers {some} of a scale."
            " Write true and false (or 1 and 0) for what is good and bad on it, and leave the rest out;"
            f" data.columns: {{{column}: null}} takes all completions for good ones."
        )
