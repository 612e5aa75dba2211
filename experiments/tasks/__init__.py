"""Tasks by name. A task is a fixed model, data set, loss and metric; what varies is the schedule."""

from collections.abc import Callable
from pathlib import Path

from experiments.errors import UsageError
from experiments.tasks import digits_cnn, mlp
from experiments.tasks.base import Task

TASKS: dict[str, Callable[[Path | None], Task]] = {
    "digits": digits_cnn.make,
    "digits-mlp": mlp.make_digits,
    "mnist1d-mlp": mlp.make_mnist1d,
}


def make_task(name: str, data_dir: Path | None = None) -> Task:
    """Builds a task by its name, or raises ``UsageError`` that lists the names there are."""
    if name not in TASKS:
        raise UsageError(f"unknown task {name!r}; there are: {', '.join(TASKS)}")
    return TASKS[name](data_dir)
