"""What happened in a run, beside its figures: `events.jsonl`, a line each, with time and place.

Training workers, Ray Train's controller and the command itself append to it, each line in one write. The command shows
lines as they come, so what a worker on another node has to say reaches the terminal.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes:
        time: ISO 8601, with the offset from UTC.
        place: host and process that wrote it.
        about: what the sentence is about, such as "train dpo".
        text: the sentence.
    """

    time: str
    place: str
    about: str
    text: str


def record(path: Path, about: str, text: str) -> None:
    """Append an event of this process. A folder that cannot be written to loses it: whatever else fails there says so.

    Args:
        path: the run's `events.jsonl`.
    """
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    event = Event(now, f"{socket.gethostname()} (process {os.getpid()})", about, text)
    line = json.dumps(asdict(event), ensure_ascii=False).encode(errors="replace") + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:
        return
    try:
        os.write(handle, line)
    except OSError:
        pass
    finally:
        os.close(handle)


class EventReader:
    """Reads a growing file of events from where it ends now.

    Args:
        path: it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offset = path.stat().st_size if path.exists() else 0

    def new(self) -> list[Event]:
        """Events that came since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                content = file.read()
        except OSError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self.offset += len(whole)
        return [event for line in whole.splitlines() if (event := _event(line))]


def _event(line: bytes) -> Event | None:
    try:
        return Event(**json.loads(line))
    except (ValueError, TypeError):
        return None
