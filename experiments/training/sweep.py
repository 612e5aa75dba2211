"""Training many runs of several tasks and optimizers, kept on disk as they finish."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import polars as pl
from rich.console import Console

from experiments.progress import make_progress
from experiments.tasks import make_task
from experiments.training import cluster
from experiments.training.engine import Engine, RunResult, RunSpec, Settings
from experiments.training.store import RunStore

Row = dict[str, Any]


class Group(NamedTuple):
    """The runs of one task and optimizer, which share a compilation."""

    task: str
    optimizer: str
    specs: Sequence[RunSpec]


def run_sweep(
    groups: Sequence[Group],
    settings: Settings,
    store: RunStore,
    console: Console,
    *,
    address: str | None = None,
    engines: dict[tuple[str, str], Engine] | None = None,
) -> None:
    """Trains the runs that the store does not hold yet.

    Args:
      groups: what to train, one at a time.
      settings: what all runs have in common.
      store: where finished runs are kept.
      console: where the progress bar goes.
      address: of a Ray cluster that trains groups side by side; None: this process does.
      engines: filled with the engine of each task and optimizer; those in it are used again, with what they
        have compiled. Not used on a cluster.
    """
    kept = store.rows()
    left = []
    for task, optimizer, specs in groups:
        done = finished(kept, task, optimizer)
        left.append(Group(task, optimizer, [spec for spec in specs if spec not in done]))
    left = [group for group in left if group.specs]
    with make_progress(console, "runs") as progress:
        total, rest = (sum(len(group.specs) for group in each) for each in (groups, left))
        bar = progress.add_task("", total=total, completed=total - rest)
        if address is None:
            trained = (
                rows
                for group in left
                for rows in _train_here(group, settings, engines, functools.partial(progress.update, bar))
            )
        else:
            progress.update(bar, description=f"on {address}")
            trained = cluster.train_groups(left, settings, address, train_group)
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
    """Trains the runs of one group, and yields the rows of some at a time."""
    key = group.task, group.optimizer
    engines = {} if engines is None else engines
    if key not in engines:
        engines[key] = Engine(make_task(group.task), group.optimizer, settings)
    for batch in engines[key].train(group.specs):
        yield [_row(group, settings.steps, *run) for run in batch]


def finished(rows: pl.DataFrame | None, task: str, optimizer: str) -> set[RunSpec]:
    """The runs of one group that are among the rows."""
    if rows is None:
        return set()
    own = rows.filter((pl.col("task") == task) & (pl.col("optimizer") == optimizer))
    return {RunSpec(*key) for key in own.select(RunSpec._fields).iter_rows()}


def _row(group: Group, steps: int, spec: RunSpec, result: RunResult, seconds: float) -> Row:
    return {
        "task": group.task,
        "optimizer": group.optimizer,
        **spec._asdict(),
        "steps": steps,
        "test_loss": float(result.test_loss[-1]),
        "test_metric": float(result.test_metric[-1]),
        "seconds": seconds,
        "loss": result.loss.tolist(),
        "rate": result.rate.tolist(),
        "test_losses": result.test_loss.tolist(),
        "test_metrics": result.test_metric.tolist(),
    }
