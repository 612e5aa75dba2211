"""Training many runs of several tasks and optimizers, stored on disk as they finish."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import polars as pl
from rich.console import Console

from experiments.progress import make_progress
from experiments.tasks import make_task
from experiments.tasks.base import Task
from experiments.training import cluster
from experiments.training.engine import Engine, RunResult, RunSpec, Settings
from experiments.training.store import RunStore

Row = dict[str, Any]


class Group(NamedTuple):
    """The runs of one task and optimizer, which share a compilation."""

    task: str
    optimizer: str
    specs: Sequence[RunSpec]
    accumulation: int = 1  # steps whose gradients are averaged for one update


def run_sweep(
    groups: Sequence[Group],
    settings: Settings,
    store: RunStore,
    console: Console,
    *,
    address: str | None = None,
    engines: dict[tuple[str, str], Engine] | None = None,
) -> None:
    """Trains the runs that are not in the store.

    Args:
      groups: the runs, one task and optimizer at a time.
      settings: shared by all runs.
      store: finished runs.
      console: for the progress bar.
      address: of a Ray cluster that trains groups in parallel; None: train in this process.
      engines: by task and optimizer; missing engines are added, the others are reused with their compiled
        programs. Ignored on a cluster.
    """
    stored = store.rows()
    missing = []
    for group in groups:
        done = finished(stored, group.task, group.optimizer)
        missing.append(group._replace(specs=[spec for spec in group.specs if spec not in done]))
    missing = [group for group in missing if group.specs]
    with make_progress(console, "runs") as progress:
        total, rest = (sum(len(group.specs) for group in each) for each in (groups, missing))
        bar = progress.add_task("", total=total, completed=total - rest)
        if address is None:
            trained = (
                rows
                for group in missing
                for rows in _train_here(group, settings, engines, functools.partial(progress.update, bar))
            )
        else:
            progress.update(bar, description=f"on {address}")
            trained = cluster.train_groups(missing, settings, address, train_group)
        for rows in trained:
            store.append(rows)
            progress.update(bar, advance=len(rows))


def _train_here(
    group: Group, settings: Settings, engines: dict[tuple[str, str], Engine] | None, update: Any
) -> Iterator[list[Row]]:
    name = f"{group.task}, {group.optimizer}"
    update(description=f"{name}: compiling")
    for rows in train_group(group, settings, engines):
        update(description=name)
        yield rows


def train_group(
    group: Group, settings: Settings, engines: dict[tuple[str, str], Engine] | None = None
) -> Iterator[list[Row]]:
    """Trains the runs of one group and yields their rows, several at a time."""
    key = group.task, group.optimizer
    engines = {} if engines is None else engines
    if key not in engines:
        engines[key] = Engine(make_task(group.task), group.optimizer, settings, group.accumulation)
    for batch in engines[key].train(group.specs):
        yield [_row(group, engines[key].task, settings.steps, *run) for run in batch]


def finished(rows: pl.DataFrame | None, task: str, optimizer: str) -> set[RunSpec]:
    """The runs of one task and optimizer among the rows."""
    if rows is None:
        return set()
    own = rows.filter((pl.col("task") == task) & (pl.col("optimizer") == optimizer))
    return {RunSpec(*key) for key in own.select(RunSpec._fields).iter_rows()}


def _row(group: Group, task: Task, steps: int, spec: RunSpec, result: RunResult, seconds: float) -> Row:
    predicted = task.text is not None and result.predictions is not None
    return {
        "task": group.task,
        "optimizer": group.optimizer,
        **spec._asdict(),
        "steps": steps,
        "test_loss": float(result.test_loss[-1]),
        "test_metric": float(result.test_metric[-1]),
        "text_score": task.text.score(result.predictions) if predicted else math.nan,
        "seconds": seconds,
        "loss": result.loss.tolist(),
        "rate": result.rate.tolist(),
        "test_losses": result.test_loss.tolist(),
        "test_metrics": result.test_metric.tolist(),
    }
