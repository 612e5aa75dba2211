"""Checks of command line options, and the console."""

import os
import sys
from collections.abc import Collection

from rich.console import Console

from experiments.errors import UsageError


def make_console() -> Console:
    """A console; 180 columns wide where standard output is not a terminal."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 180)


def one_of(option: str, value: str, allowed: Collection[str]) -> None:
    """Raises ``UsageError`` if a value is not allowed."""
    if value not in allowed:
        raise UsageError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")


def at_least(option: str, value: int, low: int) -> None:
    """Raises ``UsageError`` if a number is too small."""
    if value < low:
        raise UsageError(f"{option} must be at least {low}, got {value}")


def names(option: str, text: str, allowed: Collection[str]) -> list[str]:
    """Parses names separated by commas, each allowed and none twice."""
    found = [name.strip() for name in text.split(",")]
    for name in found:
        if name not in allowed:
            raise UsageError(
                f"{option} must be one or more of {', '.join(allowed)}, separated by commas, got {name!r}"
            )
    if len(set(found)) < len(found):
        raise UsageError(f"{option} must not repeat a value, got {text!r}")
    return found


def rates(option: str, text: str) -> list[float]:
    """Parses positive numbers separated by commas, none twice."""
    found = []
    for part in text.split(","):
        try:
            rate = float(part)
        except ValueError:
            rate = float("nan")
        if not 0 < rate < float("inf"):
            raise UsageError(f"{option} must be positive numbers separated by commas, got {part.strip()!r}")
        found.append(rate)
    if len(set(found)) < len(found):
        raise UsageError(f"{option} must not repeat a value, got {text!r}")
    return found
