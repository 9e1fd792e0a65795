"""Writes files atomically and reads rows from data files. Light to import."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from otpo.errors import UserError

Row = dict[str, Any]
"""A row of a data file: column -> value."""

ROW_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")


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
    """Read the rows of a local file.

    Args:
        path: a JSON file (a list of rows, or `{"data": [rows]}`), a JSONL, CSV or parquet file, or any of these
            gzipped (`.gz`). JSON lines may also be named `.json`. All cells of a CSV file are read as text.

    Raises:
        UserError: the file is missing, its name has no known suffix, its content is not what the suffix says, it has
            no rows, or a row is not an object.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"expected a data file at {path}, found nothing there (looked in {Path.cwd()})")
    suffix = (Path(path.stem).suffix if path.suffix.lower() == ".gz" else path.suffix).lower()
    if suffix not in ROW_SUFFIXES:
        raise UserError(
            f"cannot tell the format of {path} by its name: expected {', '.join(ROW_SUFFIXES)}, with or without .gz"
        )
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not raw.strip():
        raise UserError(f"{path} is empty: expected rows")
    rows = _parse_parquet(raw, path) if suffix == ".parquet" else _parse_text(raw, path, suffix)
    if not rows:
        raise UserError(f"{path} holds no rows: expected at least one")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{path}: expected every row to be an object with columns, row {number} is {row!r:.80}")
    return rows


def _parse_text(raw: bytes, path: Path, suffix: str) -> list[Row]:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
    if suffix == ".csv":
        return _parse_csv(text, path)
    return _parse_lines(text, path) if suffix == ".jsonl" else _parse_json(text, path)


def _parse_json(text: str, path: Path) -> list[Row]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Extra data"):  # JSON lines in a file named .json
            return _parse_lines(text, path)
        raise UserError(f"{path} is not JSON: {error}") from None
    rows = found.get("data") if isinstance(found, dict) else found
    if not isinstance(rows, list):
        kind = f"an object with the keys {sorted(found)}" if isinstance(found, dict) else f"{text.strip():.40}"
        raise UserError(f'{path}: expected a list of rows or {{"data": [rows]}}, found {kind}')
    return rows


def _parse_lines(text: str, path: Path) -> list[Row]:
    rows = []
    # str.splitlines would also break at U+2028 and similar characters, which JSON allows inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(f"{path} is not JSON lines: line {number}, column {error.colno}: {error.msg}") from None
    return rows


def _parse_csv(text: str, path: Path) -> list[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        return [{key: value for key, value in row.items() if key is not None} for row in reader]
    except csv.Error as error:
        raise UserError(f"{path} is not CSV: line {reader.line_num}: {error}") from None


def _parse_parquet(raw: bytes, path: Path) -> list[Row]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(pa.BufferReader(raw)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not parquet: {error}") from None
