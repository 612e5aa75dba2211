"""Errors that the command line reports in one line, without a traceback."""


class UsageError(Exception):
    """A wrong option or an unusable file; the message states its value and the allowed values."""
