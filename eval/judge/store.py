"""The judge's replies, in SQLite: what was paid for once is never asked again.

One row a reply, keyed by what was asked. Rows are committed as they arrive, so that a killed process loses only the
calls in flight. Failures are not stored.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from otpo.errors import UserError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    key TEXT PRIMARY KEY,
    model TEXT NOT NULL,
    response TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    seconds REAL NOT NULL
)
"""


@dataclass(frozen=True)
class Stored:
    """A reply: the endpoint's JSON as it came, tokens spent on it (failed attempts included), seconds of the call."""

    response: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float


def request_key(model: str, messages: list[dict[str, str]], parameters: dict[str, Any]) -> str:
    """sha256 over what decides the reply. The address is no part of it: a judge that moved is the same judge."""
    asked = {"model": model, "messages": messages, "parameters": parameters}
    return hashlib.sha256(json.dumps(asked, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Store:
    """An open store. Use `open_store`."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection

    def get(self, key: str) -> Stored | None:
        """The reply to a request, None if there is none yet."""
        row = self._connection.execute(
            "SELECT response, prompt_tokens, completion_tokens, seconds FROM responses WHERE key = ?", (key,)
        ).fetchone()
        return Stored(*row) if row else None

    def put(self, key: str, model: str, reply: Stored) -> None:
        """Keep a reply; on disk (as far as the operating system) when this returns."""
        self._connection.execute(
            "INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?)",
            (key, model, reply.response, reply.prompt_tokens, reply.completion_tokens, reply.seconds),
        )

    def __len__(self) -> int:
        return self._connection.execute("SELECT count(*) FROM responses").fetchone()[0]


@contextmanager
def open_store(path: str | Path) -> Iterator[Store]:
    """Open or create a store.

    Raises:
        UserError: the path cannot be written or holds something else.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, timeout=30, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(_SCHEMA)
        connection.execute("SELECT response, prompt_tokens, completion_tokens, seconds FROM responses LIMIT 0")
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"{path}: expected a place for the judge's replies (SQLite), but {error}.") from error
    try:
        yield Store(connection)
    finally:
        connection.close()
