"""Read the rows of a data file or of a data set of the Hugging Face hub, as they are."""

from __future__ import annotations

from pathlib import Path

from otpo.errors import UserError
from otpo.files import ROW_SUFFIXES, Row, read_rows


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
