"""Read the rows of a data file or of a data set of the Hugging Face hub, as they are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otpo.errors import UserError, first_line
from otpo.files import ROW_SUFFIXES, Row, iter_rows, without_nulls


@dataclass(frozen=True)
class Rows:
    """The rows of a source. They are read anew, one after the other, each time they are iterated over.

    Attributes:
        read: begins to read.
        limit: only the first rows: how many. None: all.
    """

    read: Callable[[], Iterable[Row]]
    limit: int | None = None

    def __iter__(self) -> Iterator[Row]:
        return itertools.islice(self.read(), self.limit)

    def count(self) -> int:
        """How many rows there are, told by reading them."""
        return sum(1 for _ in self)


def open_rows(source: str | Path, split: str = "train", limit: int | None = None) -> Rows:
    """The rows of a local file, or of a data set of the Hugging Face hub, without holding them in memory.

    Args:
        source: a file that `otpo.files.iter_rows` reads; anything else is a name (or a folder) for
            `datasets.load_dataset`.
        split: the split of a hub data set; files have none.
        limit: only the first rows: how many.

    Raises:
        UserError: nothing there, not readable as what its name says, or no rows. For a file, while it is read.
    """
    path = Path(source).expanduser()
    if path.is_file() or (not path.is_dir() and _names_a_file(str(source))):
        return Rows(lambda: iter_rows(path), limit)
    rows = _open_hub(str(source), split)
    if not len(rows):
        raise UserError(f"{source} holds no rows: expected at least one")
    return Rows(lambda: map(without_nulls, rows), limit)


def load_rows(source: str | Path, split: str = "train", limit: int | None = None) -> list[Row]:
    """The rows of `open_rows`, read into memory.

    Raises:
        UserError: as `open_rows`.
    """
    return list(open_rows(source, split, limit))


def _names_a_file(source: str) -> bool:
    # Hub names are "name" or "owner/name".
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith((*ROW_SUFFIXES, ".gz"))


def _open_hub(name: str, split: str) -> Any:
    """The data set, whose rows stay in a memory-mapped file."""
    try:
        import datasets

        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client raises dozens of unrelated types; all mean "not to be had"
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"'{name}' is neither a file here (looked in {Path.cwd()}) nor a data set that could be loaded from the "
            f"hub (split '{split}'): {reason:.300}. Give the path of a {', '.join(ROW_SUFFIXES)} file, or check the "
            "name and the network."
        ) from error
