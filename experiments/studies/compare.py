"""The main job: GreedyLR beside the usual schedules, with the same seeds, batches and initial rates."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import polars as pl
from rich.console import Console

import greedylr_jax
from experiments.reporting import report, summary
from experiments.tasks import make_task
from experiments.training.engine import Engine, Settings, make_specs
from experiments.training.schedules import COMPARED
from experiments.training.store import RunStore
from experiments.training.sweep import Group, run_sweep

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def compare(
    task_name: str,
    optimizers: Sequence[str],
    *,
    steps: int,
    seeds: int,
    learning_rates: Sequence[float] | None,
    out: Path,
    fresh: bool = False,
    console: Console | None = None,
) -> pl.DataFrame:
    """Trains every schedule at every initial rate and seed, and leaves table, figure and rows in ``out``.

    Args:
      task_name: a name in ``experiments.tasks.TASKS``.
      optimizers: names in ``experiments.training.engine.OPTIMIZERS``.
      steps: training steps of a run, >= 20.
      seeds: runs that differ in their initial parameters and batches, >= 1.
      learning_rates: initial rates, > 0; None: those of the task for each optimizer.
      out: folder for ``runs.parquet``, ``table.csv``, ``table.png`` and ``histories.png``.
      fresh: drop an unfinished comparison instead of going on with it.
      console: where to print.

    Returns:
      One row a run, as in ``runs.parquet``.

    Raises:
      UsageError: if the task is unknown or ``out`` cannot be used.
    """
    console = console or Console()
    task = make_task(task_name)
    rates = {name: tuple(learning_rates or task.learning_rates[name]) for name in optimizers}
    settings = {
        "task": task_name,
        "steps": steps,
        "seeds": seeds,
        "learning_rates": rates,
        "schedules": COMPARED,
        "version": greedylr_jax.__version__,
    }
    store = RunStore(out, settings, fresh=fresh)
    compilations = _CompilationCount()
    groups = [
        Group(task_name, optimizer, make_specs(COMPARED, rates[optimizer], range(seeds)))
        for optimizer in optimizers
    ]
    engines: dict[tuple[str, str], Engine] = {}
    run_sweep(groups, Settings(steps), store, console, engines=engines)
    runs = store.finish()
    compilations.stop()

    table = summary.summarize(runs)
    console.print(report.rich_table(table, report.make_title(task_name, steps, seeds), console.width))
    console.print(report.verdict(table))
    report.write(runs, table, out)
    programs = sum(engine.num_compilations for engine in engines.values())
    console.print(
        f"{len(runs)} runs. Compilations: {programs} training programs (one an optimizer serves all its "
        f"schedules, rates and seeds); {compilations.total} in all with the small ones of the set-up."
    )
    console.print(f"Table, figures and rows are in {out}.")
    return runs


class _CompilationCount:
    """Counts what XLA compiles in this process, by JAX's own monitoring."""

    def __init__(self):
        self.total = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **details: Any) -> None:
        del duration, details
        self.total += event == _COMPILE_EVENT

    def stop(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)
