"""The progress bar."""

# Imported early for its side effect: during its import it replaces the import statement by one that raises an
# error in other threads, such as the thread that draws a progress bar.
import tensorflow_datasets as _  # noqa: F401
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def make_progress(console: Console, unit: str) -> Progress:
    """A progress bar with a description, finished and total units, and the remaining time."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        console=console,
    )
