"""What studies share: how one is started, and what it leaves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import polars as pl
from rich.console import Console

import greedylr_jax
from experiments.errors import UsageError
from experiments.reporting import drawing, html
from experiments.training.engine import Engine, Settings
from experiments.training.store import RunStore, write_atomically
from experiments.training.sweep import Group, run_sweep


class Job(NamedTuple):
    """One call of a study from the command line."""

    name: str
    preset: str
    out: Path
    console: Console
    address: str | None = None  # of a Ray cluster
    fresh: bool = False  # drop an unfinished study instead of going on with it
    command: str = "study"  # of the command line, that it is one of

    def refuse_cluster(self) -> None:
        """For studies that are too short to be spread over machines."""
        if self.address is not None:
            raise UsageError(f"study {self.name} takes a few minutes on one machine: leave out --cluster")


class Sweep:
    """The training of a study: kept on disk as runs finish, resumed by the same command."""

    def __init__(self, job: Job, settings: Settings, described: Mapping[str, Any]):
        """Opens the folder; ``described`` is all that the runs depend on besides ``settings``."""
        self._job, self._settings = job, settings
        everything = {**described, **settings._asdict(), "version": greedylr_jax.__version__}
        self._store = RunStore(job.out, everything, fresh=job.fresh)
        self._engines: dict[tuple[str, str], Engine] = {}

    def train(self, groups: Sequence[Group], *, keep_programs: bool = False) -> pl.DataFrame:
        """Trains what is not there yet, and returns all rows so far."""
        engines = self._engines if keep_programs else None
        run_sweep(
            groups, self._settings, self._store, self._job.console, address=self._job.address, engines=engines
        )
        return self._store.rows()

    def finish(self) -> pl.DataFrame:
        """Puts all rows into ``runs.parquet`` and returns them."""
        return self._store.finish()


def publish(
    job: Job,
    title: str,
    text: str,
    *,
    tables: Mapping[str, pl.DataFrame],
    figures: Mapping[str, plt.Figure],
    sections: Sequence[html.Section],
    recomputed_by: str,
) -> None:
    """Writes tables as CSV, figures as PNG and ``report.html`` into the job's folder.

    Args:
      job: the call of the study.
      title: of the report.
      text: what was done.
      tables: by file name, without its ending.
      figures: by file name, without its ending.
      sections: of the report.
      recomputed_by: the function that makes every number of the report from ``runs.parquet``.
    """
    for name, table in tables.items():
        write_atomically(job.out / f"{name}.csv", table.write_csv)
    for name, figure in figures.items():
        drawing.save(figure, job.out / f"{name}.png")
    source = (
        f"All numbers follow from runs.parquet by {recomputed_by}. "
        f"Made by: python -m experiments {job.command} {job.name} --preset {job.preset}."
    )
    html.write_page(job.out / "report.html", title, f"{text} {source}", sections)
    job.console.print(f"Tables, figures, runs.parquet and report.html are in {job.out}.")
