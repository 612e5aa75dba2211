"""What a user can mend: reported in one line, without a traceback."""


class UsageError(Exception):
    """A wrong option or an unusable file; the message names it, its value and what is allowed."""
