"""The errors that a user is meant to read. The command line prints them without a traceback."""


class UserError(Exception):
    """Wrong input, found before anything was started: exit code 2.

    The message says what was expected, what was found and what to do.
    """


class WorkError(Exception):
    """A failure while working; what was finished is kept: exit code 1."""


class LastingError(WorkError):
    """A failure that the same work would meet again: it is not tried a second time unasked."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line: its type where it says nothing or only a key, and the next line
    too where the first one ends in a colon.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, KeyError):
        return ": ".join([type(error).__name__, *lines[:1]])
    return " ".join(lines[: 1 + (lines[0].endswith(":"))])
