"""Batch files in OpenAI's format: requests to hand in, and the replies that come back, which cost half as much there.

A request's `custom_id` is the key of its reply in the store, so a reply finds its question whatever file it comes in.
vLLM's `run-batch` and Azure take and give the same lines.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from eval.judge.asking.refusals import classify_status
from eval.judge.endpoint import Failure
from otpo.errors import UserError

MOST_REQUESTS, MOST_BYTES = 50_000, 200_000_000
"""Of one file, as OpenAI takes it."""
NOT_ASKED, NOT_IN_BATCH = "not_asked", "not_in_batch"


class BatchWriter:
    """Writes each question as a line of a batch file; a file that is full goes on in the next, NAME-2, NAME-3.

    Use as a context manager. The files get their names when all is written.

    Attributes:
        requests: lines written.
        files: that were written, after the end.
    """

    def __init__(self, path: Path):
        self._path, self._part, self._in_part, self._bytes = path, 0, 0, 0
        self._open: TextIO | None = None
        self._partial: list[tuple[Path, Path]] = []
        self.requests = 0
        self.files: list[Path] = []

    def __enter__(self) -> BatchWriter:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return self

    def __call__(self, key: str, body: dict[str, Any]) -> Failure:
        """Write a request."""
        request = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions", "body": body}
        line = json.dumps(request) + "\n"
        if self._open is None or self._in_part >= MOST_REQUESTS or self._bytes + len(line) > MOST_BYTES:
            self._begin()
        assert self._open is not None
        self._open.write(line)
        self._in_part, self._bytes, self.requests = self._in_part + 1, self._bytes + len(line), self.requests + 1
        return Failure(NOT_ASKED)

    def __exit__(self, kind: object, *_: object) -> None:
        if self._open is not None:
            self._open.close()
        for partial, path in self._partial:
            if kind is None:
                partial.replace(path)
                self.files.append(path)
            else:
                partial.unlink(missing_ok=True)

    def _begin(self) -> None:
        if self._open is not None:
            self._open.close()
        self._part, self._in_part, self._bytes = self._part + 1, 0, 0
        number = f"-{self._part}" if self._part > 1 else ""
        path = self._path.with_name(f"{self._path.stem}{number}{self._path.suffix}")
        partial = path.with_name(f".{path.name}.partial")
        self._partial.append((partial, path))
        self._open = partial.open("w", encoding="ascii")


class BatchReplies:
    """The replies of a batch, by the questions that they answer. Later lines win, but a failure never over a reply.

    Attributes:
        counts: lines, replies, failed (an error in place of a reply), broken (no line of a batch), and while questions
            are answered used and missing (questions that no line is about).

    Raises:
        UserError: a file cannot be read, or holds no line of a batch; if it holds requests, the message says so.
    """

    def __init__(self, files: Sequence[str | Path]):
        self.counts: Counter[str] = Counter()
        self._replies: dict[str, str] = {}
        self._failures: dict[str, Failure] = {}
        self._asked: set[str] = set()
        for file in files:
            before = self.counts["replies"] + self.counts["failed"]
            for line in _lines(Path(file).expanduser()):
                self.counts["lines"] += 1
                self._take(line, file)
            if self.counts["replies"] + self.counts["failed"] == before:
                raise UserError(f"{file}: expected lines of a batch's output (custom_id and response); found none.")

    def __call__(self, key: str, body: dict[str, Any]) -> str | Failure:
        """The reply to a question, or why there is none."""
        self._asked.add(key)
        if key in self._replies:
            self.counts["used"] += 1
            return self._replies[key]
        if key not in self._failures:
            self.counts["missing"] += 1
        return self._failures.get(key, Failure(NOT_IN_BATCH, "no line of the batch is about this question"))

    @property
    def unknown(self) -> int:
        """Replies to questions that were not open: known before, or of other outputs, settings or another judge."""
        return len(self._replies.keys() - self._asked)

    def _take(self, line: str, file: str | Path) -> None:
        try:
            row = json.loads(line)
            key, response = str(row["custom_id"]), row.get("response")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self.counts["broken"] += 1
            return
        if response is None and "body" in row:
            raise UserError(
                f"{file}: these are the requests of a batch. Hand the file in, and read the file of replies that comes "
                "back."
            )
        status = response.get("status_code", 200) if isinstance(response, dict) else None
        body = response.get("body") if isinstance(response, dict) else None
        if status == 200 and isinstance(body, dict):
            self.counts["replies"] += 1
            self._replies[key] = json.dumps(body, ensure_ascii=False)
            return
        self.counts["failed"] += 1
        self._failures[key] = _failure(status, body, row.get("error"))


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text("utf-8", errors="replace").split("\n") if line.strip()]
    except OSError as error:
        raise UserError(f"{path}: expected the output of a batch (JSON lines), but {error.strerror}.") from None


def _failure(status: Any, body: Any, error: Any) -> Failure:
    """What an error line says, classed as the same status of a call would be."""
    if isinstance(status, int) and status != 200:
        return Failure(*classify_status(status, json.dumps(body)))
    said = error if isinstance(error, dict) else {}
    code = str(said.get("code") or "batch_failed")
    kinds = {"batch_expired": "batch_expired", "batch_cancelled": "batch_cancelled"}
    return Failure(kinds.get(code, "batch_failed"), f"{code}: {said.get('message') or error or 'no reply'}"[:300])
