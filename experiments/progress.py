"""The progress bar of long work."""

# Here for its effect: while it is imported the import statement is another one, which raises an error in a
# thread that imports something at that moment, as that of a bar does whenever it draws.
import tensorflow_datasets as _  # noqa: F401
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def make_progress(console: Console, unit: str) -> Progress:
    """A bar with what is being done, how many units of how many, and the time that is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        console=console,
    )
