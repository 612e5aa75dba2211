"""Training many runs of several tasks and optimizers, kept on disk as they finish."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import polars as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments.engine import Engine, RunResult, RunSpec
from experiments.store import RunStore
from experiments.tasks.base import Task


class Group(NamedTuple):
    """The runs of one task and optimizer, which share a compilation."""

    task: Task
    optimizer: str
    specs: Sequence[RunSpec]


def run_sweep(
    groups: Sequence[Group],
    steps: int,
    store: RunStore,
    console: Console,
    engines: dict[tuple[str, str], Engine] | None = None,
) -> None:
    """Trains the runs that the store does not hold yet.

    Args:
      groups: what to train, one at a time.
      steps: training steps of every run.
      store: where finished runs are kept.
      console: where the progress bar goes.
      engines: filled with the engine of each task and optimizer; those in it are used again, with what they
        have compiled.
    """
    engines = {} if engines is None else engines
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("runs"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=sum(len(group.specs) for group in groups))
        for task, optimizer, specs in groups:
            done = finished(store.rows(), task.name, optimizer)
            left = [spec for spec in specs if spec not in done]
            name = f"{task.name}, {optimizer}"
            progress.update(bar, description=f"{name}: compiling", advance=len(specs) - len(left))
            engine = engines.setdefault((task.name, optimizer), Engine(task, optimizer, steps))
            for batch in engine.train(left):
                store.append([_row(task, optimizer, steps, *pair) for pair in batch])
                progress.update(bar, advance=len(batch), description=name)


def finished(rows: pl.DataFrame | None, task: str, optimizer: str) -> set[RunSpec]:
    """The runs of one group that are among the rows."""
    if rows is None:
        return set()
    own = rows.filter((pl.col("task") == task) & (pl.col("optimizer") == optimizer))
    return {RunSpec(*key) for key in own.select(RunSpec._fields).iter_rows()}


def _row(task: Task, optimizer: str, steps: int, spec: RunSpec, result: RunResult) -> dict[str, Any]:
    return {
        "task": task.name,
        "optimizer": optimizer,
        **spec._asdict(),
        "steps": steps,
        "test_loss": float(result.test_loss),
        "test_accuracy": float(result.test_accuracy),
        "loss": result.loss.tolist(),
        "rate": result.rate.tolist(),
    }
