"""Checks of what the command line was given, and where it writes to."""

import os
import sys
from collections.abc import Collection

from rich.console import Console

from experiments.errors import UsageError


def make_console() -> Console:
    """A console; a file or a pipe has no width, and tables need some."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 180)


def one_of(option: str, value: str, allowed: Collection[str]) -> None:
    """Refuses a value that is not among those allowed."""
    if value not in allowed:
        raise UsageError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")


def at_least(option: str, value: int, low: int) -> None:
    """Refuses a number that is too low."""
    if value < low:
        raise UsageError(f"{option} must be at least {low}, got {value}")


def names(option: str, text: str, allowed: Collection[str]) -> list[str]:
    """Names with commas between, each of those allowed and none twice."""
    found = [name.strip() for name in text.split(",")]
    for name in found:
        if name not in allowed:
            raise UsageError(f"{option} must be of {', '.join(allowed)}, with commas, got {name!r}")
    if len(set(found)) < len(found):
        raise UsageError(f"{option} names one twice: {text!r}")
    return found


def rates(option: str, text: str) -> list[float]:
    """Positive numbers with commas between, none twice."""
    found = []
    for part in text.split(","):
        try:
            rate = float(part)
        except ValueError:
            rate = float("nan")
        if not 0 < rate < float("inf"):
            raise UsageError(f"{option} must be positive numbers with commas, got {part.strip()!r}")
        found.append(rate)
    if len(set(found)) < len(found):
        raise UsageError(f"{option} names one twice: {text!r}")
    return found
