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
        source: a file that `otpo.files.iter_rows` reads; anything else is a name for `datasets.load_dataset`, or a
            folder that is laid out as a data set of the hub: files named by their split, or a card that names them.
        split: the split of a hub data set; files have none.
        limit: only the first rows: how many.

    Raises:
        UserError: nothing there, not readable as what its name says, or no rows. For a file, while it is read.
    """
    path = Path(source).expanduser()
    if path.is_file() or (not path.is_dir() and _names_a_file(str(source))):
        return Rows(lambda: iter_rows(path), limit)
    if path.is_dir():
        _check_folder(path, split)
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


def _check_folder(folder: Path, split: str) -> None:
    """Refuse a folder out of which `datasets` would take files that nobody named."""
    card = folder / "README.md"
    front = card.read_text(errors="replace").split("\n---")[0] if card.is_file() else ""
    by_card = front.startswith("---") and ("configs:" in front or "dataset_info:" in front)
    if by_card or any(folder.glob(f"{split}*")) or any(folder.glob(f"data/{split}*")):
        return
    if any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        way = "it was saved by `save_to_disk`: write its rows to a file, `load_from_disk(FOLDER).to_parquet(FILE)`"
    elif files := sorted(each.name for each in folder.iterdir() if each.name.endswith((*ROW_SUFFIXES, ".gz"))):
        way = f"name one of the files in it ({', '.join(files[:8])}{', ...' if len(files) > 8 else ''})"
    else:
        way = f"it holds no {', '.join(ROW_SUFFIXES)} file"
    raise UserError(f"{folder} is a folder, and nothing in it is called after the split '{split}': {way}.")


def _open_hub(name: str, split: str) -> Any:
    """The data set, whose rows stay in a memory-mapped file."""
    try:
        import datasets

        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client raises dozens of unrelated types; all mean "not to be had"
        reason = first_line(error).rstrip(".")
        if Path(name).expanduser().is_dir():
            raise UserError(
                f"{name} is a folder that cannot be read as a data set (split '{split}'): {reason}"
            ) from error
        raise UserError(
            f"'{name}' is neither a file here (looked in {Path.cwd()}) nor a data set that could be loaded from the "
            f"hub (split '{split}'): {reason:.300}. Give the path of a {', '.join(ROW_SUFFIXES)} file, or check the "
            "name and the network."
        ) from error
