"""Writes files atomically and reads rows from data files. Light to import."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from otpo.errors import UserError, first_line
from otpo.json_tables import NoRows, rows_of
from otpo.lfs import POINTER, is_pointer

Row = dict[str, Any]
"""A row of a data file: column -> value."""

ROW_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
BLOCK = 2**20  # characters of a JSON file that are read at a time
PARQUET_ROWS = 256  # rows of a parquet file that are read at a time
GZIP, KINDS = b"\x1f\x8b", {b"PAR1": "a parquet file: name it .parquet", b"PK": "a zip archive: unpack it"}
"""First bytes of a gzipped file, and of files that are not what their name says."""

_ADDRESS = re.compile(r"\s*(?:[A-Za-z][A-Za-z0-9+.-]*:[/\\]|(?:s3|gs)(?:://?|:|//))")
NOT_READ = "files and models are read from folders, or from the hub: mount the storage, or copy it here"


def is_address(place: str | Path) -> bool:
    """Whether a place is an address such as `s3://bucket/folder`, well spelled or not, and no path."""
    return _ADDRESS.match(str(place)) is not None


# ---- writing ----


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file under a temporary name and rename it to `path` once the block ends without an error.

    Yields:
        The temporary path, in the same folder, which is created if needed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: str | Path, text: str, *, errors: Literal["strict", "replace"] = "strict") -> None:
    """Write a UTF-8 text file. A reader sees either the old content or the new, never a part.

    Args:
        path: the file.
        text: its new content.
        errors: "replace" writes a question mark for half of a surrogate pair, which UTF-8 cannot hold.

    Raises:
        UnicodeEncodeError: `text` holds half of a surrogate pair and `errors` is "strict".
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors=errors)


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


# ---- reading rows ----


def read_rows(path: str | Path) -> list[Row]:
    """Read the rows of a local file into memory; see `iter_rows`."""
    return list(iter_rows(path))


def iter_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a local file, read as they are asked for: memory does not grow with the file.

    Two kinds of file are read whole all the same: a JSON object that holds rows, and parquet inside `.gz`.

    Args:
        path: a JSON file (a list of rows, or an object as `otpo.json_tables` reads it), a JSONL, CSV, TSV or parquet
            file, or any of these gzipped, whatever the name says. Each of the two kinds of JSON may have the other's
            name. Text is UTF-8, UTF-16 or UTF-32. All cells of a CSV file are read as text; where its header has
            semicolons or tabs and no comma, they part the cells.

    Raises:
        UserError: the file is missing, its name has no known suffix, its content is not what the suffix says, it has
            no rows, a row is not an object, or a cell would be lost: two columns or keys of one name, or a line of CSV
            with more cells than the header.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        why = f": that is an address, and {NOT_READ}" if is_address(path) else f" (looked in {Path.cwd()})"
        raise UserError(f"expected a data file at {path}, found nothing there{why}")
    suffix = (Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix).lower()
    if suffix not in ROW_SUFFIXES:
        raise UserError(
            f"cannot tell the format of {path} by its name: expected {', '.join(ROW_SUFFIXES)}, with or without .gz"
        )
    number = -1
    try:
        if _is_blank(path):
            raise UserError(f"{path} is empty: expected rows")
        if is_pointer(path):
            raise UserError(f"{path} {POINTER}.")
        for number, row in enumerate(_READERS[suffix](path)):
            if not isinstance(row, dict):
                raise UserError(f"{path}: expected every row to be an object with columns, row {number} is {row!r:.80}")
            yield row
    except _Twice as error:
        raise UserError(f"{path}: {error}. Write each key once.") from None
    except UnicodeDecodeError:
        raise _not_text(path) from None
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from None
    if number < 0:
        raise UserError(f"{path} holds no rows: expected at least one")


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if _is_gzip(path) else path.open("rb")


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(GZIP)) == GZIP


def _text(path: Path, newline: str = "\n") -> io.TextIOWrapper:
    with _open(path) as file:
        encoding = json.detect_encoding(file.read(4))
    # Lines end at "\n" alone: JSON allows U+2028 and similar characters inside strings.
    return io.TextIOWrapper(_open(path), encoding=encoding, newline=newline)


def _not_text(path: Path) -> UserError:
    with _open(path) as file:
        first = file.read(4)
    for begins, kind in KINDS.items():
        if first.startswith(begins):
            return UserError(f"{path} is {kind}.")
    name = shlex.quote(str(path))
    return UserError(
        f"{path} is not UTF-8 text, and no other encoding is guessed. Convert it from its own, which is often Latin-1 "
        f"or Windows-1252: `iconv -f WINDOWS-1252 -t UTF-8 {name} > converted{path.suffix}`"
    )


def _is_blank(path: Path) -> bool:
    with _open(path) as file:
        return not any(block.strip() for block in iter(lambda: file.read(BLOCK), b""))


def _json(path: Path) -> Iterator[Any]:
    with _text(path) as file:
        first = next(line for line in iter(lambda: file.readline(BLOCK), "") if not line.isspace())
        lines = _is_json(first) and any(not line.isspace() for line in file)
    if first.lstrip().startswith("["):
        yield from _json_list(path)
    else:
        yield from _json_lines(path) if lines else _json_whole(path)


def _is_json(text: str) -> bool:
    try:
        _decode(text)
    except json.JSONDecodeError:
        return False
    return True


def _jsonl(path: Path) -> Iterator[Any]:
    with _text(path) as file:
        first = next(line for line in iter(lambda: file.readline(BLOCK), "") if not line.isspace())
    yield from _json_list(path) if first.lstrip().startswith("[") else _json_lines(path)


def _json_list(path: Path) -> Iterator[Any]:
    """The elements of a JSON list, each decoded as soon as its text is there."""
    decode, found = _DECODER.raw_decode, 0
    with _text(path) as file:
        text, size = "", BLOCK
        while "[" not in text:
            text = file.read(BLOCK)
        at, ended = text.index("[") + 1, False
        while not ended:
            at = _after_space(text, at)
            try:
                value, end = decode(text, at)
                after = _after_space(text, end)
                if text[after : after + 1] not in (",", "]"):
                    raise ValueError("the element may go on in the next block")
            except ValueError:  # also of a number that is too long
                more = file.read(size)
                if not more:
                    break
                text, at, size = text[at:] + more, 0, 2 * size  # a long element is not decoded over and over
                continue
            yield value
            found, size, at, ended = found + 1, BLOCK, after + 1, text[after] == "]"
        if ended and not text[at:].strip() and not any(line.strip() for line in file):
            return
    yield from _json_whole(path)[found:]  # an empty list, or an error that only the whole text explains


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Twice(f"an object has the key {twice!r} twice, and one of its values would be lost: {found!s:.80}")
    return found


class _Twice(Exception):
    """A key that an object has twice."""


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_decode = _DECODER.decode


def _after_space(text: str, start: int) -> int:
    while start < len(text) and text[start] in " \t\n\r":
        start += 1
    return start


def _json_whole(path: Path) -> list[Any]:
    with _text(path) as file:
        text = file.read()
    try:
        found = _decode(text)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Extra data"):  # JSON lines in a file named .json
            return list(_json_lines(path))
        raise UserError(f"{path} is not JSON: {error}") from None
    if isinstance(found, list):
        return found
    if not isinstance(found, dict):
        raise UserError(f'{path}: expected a list of rows or {{"data": [rows]}}, found {text.strip():.40}')
    try:
        return rows_of(found)
    except NoRows as error:
        raise UserError(f"{path}: {error}.") from None


def _json_lines(path: Path) -> Iterator[Any]:
    with _text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield _decode(line)
                except json.JSONDecodeError as error:
                    where = f"line {number}, column {error.colno}"
                    raise UserError(f"{path} is not JSON lines: {where}: {error.msg}") from None


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _text(path, newline="") as file:
        reader = csv.DictReader(file, delimiter=_delimiter(path), strict=True)
        try:
            names = [name for name in reader.fieldnames or () if name.strip()]
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise UserError(
                    f"{path}: the header has the column {twice!r} twice. Give each column a name of its own."
                )
            for row in reader:
                surplus: Any = row.pop(None, ())  # type: ignore[call-overload]
                if any(cell.strip() for cell in surplus):
                    raise UserError(
                        f"{path}: line {reader.line_num} has {len(row) + len(surplus)} cells, and the header"
                        f' {len(row)} columns. Quote cells that hold commas: "a, b".'
                    )
                yield row
        except csv.Error as error:
            raise UserError(f"{path} is not CSV: line {reader.line_num}: {error}") from None


def _delimiter(path: Path) -> str:
    """What parts the cells: tabs or semicolons, as spreadsheets write them, where the header has no comma."""
    if ".tsv" in path.suffixes:
        return "\t"
    with _text(path) as file:
        header = file.readline(BLOCK)
    return next((mark for mark in ",\t;" if mark in header), ",")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet

    source: Any = str(path)
    if _is_gzip(path):
        with _open(path) as packed:
            source = pa.BufferReader(packed.read())
    try:
        with pyarrow.parquet.ParquetFile(source, memory_map=True) as file:
            names = file.schema_arrow.names
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise UserError(f"{path} has the column {twice!r} twice. Give each column a name of its own.")
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                yield from map(without_nulls, batch.to_pylist())
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not parquet: {first_line(error)}") from None


def without_nulls(row: Row) -> Row:
    """A row of a table without the nulls inside its cells, which stand where an object lacks a key that others have.

    A chat template would write them into prompts, for example as parameters of a tool.
    """
    return {column: _dense(cell) if isinstance(cell, dict | list) else cell for column, cell in row.items()}


def _dense(cell: Any) -> Any:
    if isinstance(cell, dict):
        return {key: _dense(value) for key, value in cell.items() if value is not None}
    return [_dense(value) for value in cell] if isinstance(cell, list) else cell


_READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
