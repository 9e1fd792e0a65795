"""The two errors a user is meant to read. The command line prints them without a traceback."""


class UserError(Exception):
    """Wrong input, found before anything was started: exit code 2.

    The message says what was expected, what was found and what to do.
    """


class WorkError(Exception):
    """A failure while working; what was finished is kept: exit code 1."""
