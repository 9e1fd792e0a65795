"""Keeps a folder on object storage equal to a local one, so that another machine can go on from there.

Objects change one at a time, and the process can end between any two. So `.copied.json` there lists the files that
belong together, and whoever fetches the folder takes those alone. New files are sent before they are listed; a file
that is replaced or deleted is taken off the list before. A file that is missing because of that is made again, as if a
person had deleted it.

The list has a token that changes with it. A local folder that knows the token has seen all that is there, and is not
fetched again.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any

from otpo.files import write_json
from pipeline.progress import Progress, silent
from pipeline.storage.remote import Remote

LIST = ".copied.json"
THREADS = 8
COMPLETE = "complete.json"  # in a checkpoint's folder once it is whole
VALID_WHILE_REPLACED = (".jsonl", ".sqlite", "manifest.json")
"""Ends of the names of files whose earlier content goes with later files: they are only added to, or say what is done
(of which each file is looked for)."""
STAYS = re.compile(r"\.partial|^\.(?!metadata$)|^writer-\d+\.lock$|^ray$|\.sqlite-(wal|shm)$")
"""Names of files and folders that are not copied: unfinished files, locks, and what Ray makes anew."""

Stamp = list[int]  # bytes, and when it was changed in ns


class Copying:
    """Copies of one folder.

    Args:
        remote: the folder on object storage.
        local: the folder here.
        memory: a local file outside it, which remembers what was copied.
    """

    def __init__(self, remote: Remote, local: Path, memory: Path):
        self.remote, self.local, self.memory = remote, local, memory
        known = json.loads(memory.read_text()) if memory.exists() else {}
        self.tokens: list[str] = known.get("tokens", [])
        self.files: dict[str, Stamp] = known.get("files", {})

    def fetch(self, progress: Progress = silent) -> int:
        """Make the local folder what the remote one is, if another machine has written that.

        Returns:
            Files that were fetched.
        """
        content = self.remote.read(LIST)
        if content is None and self.tokens:  # somebody emptied the remote folder: everything is sent again
            self._remember([], {})
            return 0
        there: dict[str, Any] = json.loads(content) if content else {"token": "", "files": self._unlisted()}
        if there["token"] in self.tokens or not (content or there["files"]):
            return 0
        fresh = self.local.with_name(f"{self.local.name}.partial")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        lost: list[str] = []

        def fetch(path: str) -> None:
            file, stamp = fresh / path, there["files"][path]
            try:
                self.remote.download(path, file)
            except FileNotFoundError:
                lost.append(path)
                return
            if stamp and file.stat().st_size != stamp[0] and not path.endswith(VALID_WHILE_REPLACED):
                file.unlink()
                lost.append(path)

        _each(there["files"], fetch, f"fetch {self.local.name}", progress)
        shutil.rmtree(self.local, ignore_errors=True)
        self.memory.unlink(missing_ok=True)
        fresh.rename(self.local)
        self._remember([there["token"]] if content else [], stamps(self.local))
        if not content:
            self._list(self.files)
        return len(there["files"]) - len(lost)

    def send(self, progress: Progress = silent) -> int:
        """Make the remote folder what the local one is.

        Returns:
            Files that were sent or deleted.
        """
        found, before = stamps(self.local), self.files
        new = [path for path in found if path not in before]
        replaced = [path for path in found if path in before and found[path] != before[path]]
        removed = [path for path in before if path not in found]
        if not (new or replaced or removed):
            return 0
        if not self.tokens:
            self._list({})
        gone = self._upload(new, progress)
        if replaced or removed:
            earlier = {path: before[path] for path in replaced if path.endswith(VALID_WHILE_REPLACED)}
            settled = {path: stamp for path, stamp in found.items() if path not in gone.union(replaced)}
            self._list(settled | earlier, unfinished=[*removed, *replaced])
        for path in removed:
            self.remote.delete(path)
        gone |= self._upload(replaced, progress)
        self._list({path: stamp for path, stamp in found.items() if path not in gone})
        return len(new) + len(replaced) + len(removed)

    def _unlisted(self) -> dict[str, None]:
        """Files of a folder that somebody else copied there."""
        return {path: None for path in self.remote.objects() if not stays(path)}

    def _upload(self, paths: list[str], progress: Progress) -> set[str]:
        """Send files. Returns those that were deleted before it was their turn."""
        gone: set[str] = set()

        def send(path: str) -> None:
            try:
                upload(self.remote, self.local / path, path)
            except FileNotFoundError:
                gone.add(path)

        _each(paths, send, f"copy {self.local.name}", progress)
        return gone

    def _list(self, files: dict[str, Stamp], unfinished: Iterable[str] = ()) -> None:
        """Write the list there and what is known here.

        Args:
            unfinished: files that are about to be replaced or deleted: if the process ends before, it is done again.
        """
        token = secrets.token_hex(8)
        # the process may end between the two writes: whichever token is there then, this folder has seen it
        self._remember([*self.tokens[-1:], token], self.files)
        self.remote.write(LIST, json.dumps({"token": token, "files": files}).encode())
        self._remember([token], files | {path: [] for path in unfinished})

    def _remember(self, tokens: list[str], files: dict[str, Stamp]) -> None:
        self.tokens, self.files = tokens, files
        write_json(self.memory, {"tokens": tokens, "files": files})


def stays(path: str) -> bool:
    """Whether a file is not copied, by its path inside the folder."""
    return any(STAYS.search(part) for part in PurePosixPath(path).parts)


def stamps(folder: Path) -> dict[str, Stamp]:
    """Path -> stamp of the files that are copied. Checkpoints that are not complete are left out."""
    found: dict[str, Stamp] = {}
    for place, folders, names in os.walk(folder):
        here = Path(place)
        if here.parent.name == "checkpoints" and COMPLETE not in names:
            folders.clear()
            continue
        folders[:] = [name for name in folders if not stays(name)]
        for name in names:
            file = here / name
            try:
                if not stays(name):
                    found[file.relative_to(folder).as_posix()] = _stamp(file)
            except FileNotFoundError:  # deleted since it was listed
                continue
    return dict(sorted(found.items()))


def _stamp(file: Path) -> Stamp:
    parts = [file.stat()]
    beside = file.with_name(f"{file.name}-wal")  # new rows of a SQLite file
    if file.suffix == ".sqlite" and beside.exists():
        parts.append(beside.stat())
    return [sum(part.st_size for part in parts), max(part.st_mtime_ns for part in parts)]


def upload(remote: Remote, file: Path, path: str) -> None:
    """Copy a file as it is now; of a SQLite file that is being written all finished transactions.

    Raises:
        FileNotFoundError: the file is gone.
    """
    if file.suffix != ".sqlite":
        remote.upload(file, path)
        return
    file.stat()
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / file.name
        with closing(sqlite3.connect(file, timeout=30)) as source, closing(sqlite3.connect(whole)) as target:
            source.backup(target)
        remote.upload(whole, path)


def fetch_missing(remote: Remote, local: Path, progress: Progress = silent) -> None:
    """Fetch the files that are not here, of a folder whose files never change."""
    missing = [path for path in remote.objects() if not stays(path) and not (local / path).exists()]

    def fetch(path: str) -> None:
        partial = (local / path).with_name(f".{PurePosixPath(path).name}.partial")
        remote.download(path, partial)
        os.replace(partial, local / path)

    _each(missing, fetch, f"fetch {local.name}", progress)


def send_missing(remote: Remote, local: Path, sent: set[str], progress: Progress = silent) -> None:
    """Send the files that are not yet in `sent`, of a folder whose files never change, and add them to it."""
    paths = [path for path in stamps(local) if path not in sent]
    _each(paths, lambda path: remote.upload(local / path, path), f"copy {local.name}", progress)
    sent.update(paths)


def _each(paths: Iterable[str], do: Callable[[str], Any], what: str, progress: Progress) -> None:
    paths = list(paths)
    with ThreadPoolExecutor(THREADS) as threads:
        for number, _ in enumerate(threads.map(do, paths), start=1):
            progress(what, number, len(paths), "")
