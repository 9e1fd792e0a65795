"""Keeps the judge's replies in SQLite, so that no question is paid for twice.

One row a reply, keyed by the request. Each row is committed as it arrives, so a killed process loses only the calls
that were running. Failures are not stored.
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
_WAYS = "CREATE TABLE IF NOT EXISTS ways (key TEXT PRIMARY KEY, way TEXT NOT NULL)"
_IDENTITIES = "CREATE TABLE IF NOT EXISTS identities (name TEXT PRIMARY KEY, first TEXT NOT NULL, now TEXT NOT NULL)"


@dataclass(frozen=True)
class StoredReply:
    """A reply.

    Attributes:
        response: the body of the HTTP reply, as it came.
        prompt_tokens: spent on it, failed attempts included.
        completion_tokens: spent on it, failed attempts included.
        seconds: duration of the call.
    """

    response: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float


def request_key(model: str, messages: list[dict[str, str]], parameters: dict[str, Any]) -> str:
    """sha256 of everything that decides the reply. The address is left out: a judge that moved is the same judge."""
    asked = {"model": model, "messages": messages, "parameters": parameters}
    return hashlib.sha256(json.dumps(asked, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Store:
    """An open store. Use `open_store`."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection

    def get(self, key: str) -> StoredReply | None:
        """The reply to a request; None if there is none yet."""
        row = self._connection.execute(
            "SELECT response, prompt_tokens, completion_tokens, seconds FROM responses WHERE key = ?", (key,)
        ).fetchone()
        return StoredReply(*row) if row else None

    def put(self, key: str, model: str, reply: StoredReply) -> None:
        """Keep a reply. Once this returns, the reply has reached the operating system."""
        self._connection.execute(
            "INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?)",
            (key, model, reply.response, reply.prompt_tokens, reply.completion_tokens, reply.seconds),
        )

    def way(self, key: str) -> str | None:
        """How an endpoint was found to be asked; None if that is not known."""
        row = self._connection.execute("SELECT way FROM ways WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def put_way(self, key: str, way: str) -> None:
        """Keep how an endpoint can be asked."""
        self._connection.execute("INSERT OR REPLACE INTO ways VALUES (?, ?)", (key, way))

    def judge_name(self, model: str) -> str:
        """The judge in a reply's key: the model's name, with what it answers as where that has changed."""
        found = self.identity(model)
        return model if found is None or found[0] == found[1] else f"{model} = {found[1]}"

    def identity(self, model: str) -> tuple[str, str] | None:
        """What the endpoint called a model when it first answered here, and what it calls it now; None before that."""
        row = self._connection.execute("SELECT first, now FROM identities WHERE name = ?", (model,)).fetchone()
        return (row[0], row[1]) if row else None

    def put_identity(self, model: str, now: str) -> None:
        """Keep what an endpoint calls a model."""
        first, _ = self.identity(model) or (now, now)
        self._connection.execute("INSERT OR REPLACE INTO identities VALUES (?, ?, ?)", (model, first, now))

    def rename(self, old: str, new: str) -> None:
        """Give a reply another key."""
        self._connection.execute("UPDATE OR REPLACE responses SET key = ? WHERE key = ?", (new, old))

    def __len__(self) -> int:
        return self._connection.execute("SELECT count(*) FROM responses").fetchone()[0]


@contextmanager
def open_store(path: str | Path) -> Iterator[Store]:
    """Open or create a store.

    Raises:
        UserError: the path cannot be written, or holds something other than a store.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # in a notebook another thread asks the judge, while this one waits (`eval.judge.event_loop`)
        connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(_SCHEMA)
        connection.execute(_WAYS)
        connection.execute(_IDENTITIES)
        connection.execute("SELECT response, prompt_tokens, completion_tokens, seconds FROM responses LIMIT 0")
    except (OSError, sqlite3.Error) as error:
        raise UserError(f"{path}: expected a file for the judge's replies (SQLite), but {error}..") from error
    try:
        yield Store(connection)
    finally:
        connection.close()
