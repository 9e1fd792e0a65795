"""Faults of the machine in words: a full disk, a folder that may not be written, storage that does not answer."""

from __future__ import annotations

import errno
import re
import shutil
import sqlite3

REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "The disk or the quota is full: free some space"),
    errno.EFBIG: "The file system allows no file of that size: take another one (--runs, --out)",
    errno.EROFS: "The file system is read-only: mount it for writing, or take another folder (--runs, --out)",
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM), "Give yourself the right to it, or take another folder (--runs, --out)"
    ),
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENOTCONN),
        "The storage does not answer as it should: see to it, or take another (--runs, --out)",
    ),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Too many files are open: raise the limit (`ulimit -n 65536`)"),
    errno.ENAMETOOLONG: "Give a shorter name or a folder nearer to the root",
    errno.ENOMEM: "The machine is out of memory: end other programs",
}


def outside_fault(error: BaseException) -> str | None:
    """What to tell a person about an error that is the machine's; None for any other, which is a fault of ours.

    Errors that were raised from such a one count as it.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and not isinstance(seen, shutil.Error) and seen.errno in REMEDIES:
            where = f" '{seen.filename}'" if seen.filename else ""
            return f"{seen.strerror}{where}. {REMEDIES[seen.errno]}; what was finished is kept, and {_AGAIN}"
        if isinstance(seen, sqlite3.OperationalError) and ("full" in str(seen) or "readonly" in str(seen)):
            return f"The judge's replies cannot be stored: {seen}. Free some space or make it writable, and {_AGAIN}"
        if isinstance(seen, shutil.Error):
            first = seen.args[0][0] if seen.args and isinstance(seen.args[0], list) else (str(seen),)
            return f"A folder could not be copied: {first[-1]}. Mend that, and {_AGAIN}"
        if re.search(
            r"No space left on device|Disk quota exceeded", str(seen)
        ):  # of libraries with errors of their own
            return f"{seen}. {REMEDIES[errno.ENOSPC]}; what was finished is kept, and {_AGAIN}"
        seen = seen.__cause__ or seen.__context__
    return None


_AGAIN = "the same command goes on."
