"""The two errors a user is meant to read (the same pair as `otpo.errors`: neither package knows the other)."""


class UserError(Exception):
    """Wrong input, found before anything was started: exit code 2.

    The message says what was expected, what was found and what to do.
    """


class WorkError(Exception):
    """A failure while working; what was finished is kept: exit code 1."""
