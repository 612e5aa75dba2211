"""The parts that all studies share: the job, the training, and the output."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import polars as pl
from rich.console import Console

import greedylr_jax
from experiments.errors import UsageError
from experiments.options import names
from experiments.reporting import drawing, html
from experiments.reporting.summary import GREEDYLR
from experiments.tasks import TASKS
from experiments.training.engine import OPTIMIZERS, Engine, Settings
from experiments.training.schedules import parse
from experiments.training.store import RunStore, write_atomically
from experiments.training.sweep import Group, run_sweep

_ROW_FORMAT = 3  # of the stored rows; unfinished studies of another format cannot be resumed


class Selection(NamedTuple):
    """The part of a study to run, as given on the command line; None: what the preset says.

    Attributes:
      task: names of tasks, or of entries of the suite, separated by commas.
      optimizer: names of optimizers, separated by commas.
      split: half of the suite, "development" or "held-out".
      rule: names of rules, separated by commas.
      steps: numbers of training steps, separated by commas.
    """

    task: str | None = None
    optimizer: str | None = None
    split: str | None = None
    rule: str | None = None
    steps: str | None = None

    @property
    def arguments(self) -> str:
        """The options of the command line, each after a space."""
        given = {name: value for name, value in self._asdict().items() if value is not None}
        return "".join(f" --{name} {value}" for name, value in given.items())


class Job(NamedTuple):
    """One call of a study from the command line.

    Attributes:
      name: of the study.
      preset: key of the study's ``PRESETS``.
      out: folder for the results.
      console: for tables and progress.
      address: of a Ray cluster to train on; None: this process.
      fresh: discard an unfinished study instead of resuming it.
      command: the command that runs the study, after ``python -m experiments``.
      arguments: of the command; None: the name, the preset and the selection.
      selection: part of the study.
    """

    name: str
    preset: str
    out: Path
    console: Console
    address: str | None = None
    fresh: bool = False
    command: str = "study"
    arguments: str | None = None
    selection: Selection = Selection()

    @property
    def call(self) -> str:
        """The command line that repeats this job."""
        arguments = self.arguments
        if arguments is None:
            arguments = f"{self.name} --preset {self.preset}{self.selection.arguments}"
        return f"python -m experiments {self.command} {arguments}"

    def tasks(self, default: Sequence[str], allowed: Collection[str] = TASKS) -> tuple[str, ...]:
        """The tasks to train: those of ``--task``, or ``default``."""
        given = self.selection.task
        return tuple(default if given is None else names("--task", given, allowed))

    def optimizers(self, default: Sequence[str]) -> tuple[str, ...]:
        """The optimizers to train with: those of ``--optimizer``, or ``default``."""
        given = self.selection.optimizer
        return tuple(default if given is None else names("--optimizer", given, OPTIMIZERS))

    def one_task(self, default: str) -> str:
        """The same for a study of a single task."""
        return _single("--task", self.name, self.tasks((default,)))

    def one_optimizer(self, default: str) -> str:
        """The same for a study with a single optimizer."""
        return _single("--optimizer", self.name, self.optimizers((default,)))

    def in_folder(self, name: str) -> "Job":
        """The same job with a subfolder for its results."""
        return self._replace(out=self.out / name)

    def refuse_cluster(self) -> None:
        """Raises ``UsageError`` if a cluster was requested; for studies that take only minutes."""
        if self.address is not None:
            raise UsageError(f"study {self.name} takes a few minutes on one machine: leave out --cluster")


def _single(option: str, study: str, values: Sequence[str]) -> str:
    if len(values) > 1:
        raise UsageError(f"{option} must be one name for study {study}, got {','.join(values)!r}")
    return values[0]


class Sweep:
    """The training of a study: stored on disk as runs finish, resumed by the same command."""

    def __init__(
        self, job: Job, settings: Settings, described: Mapping[str, Any], *, extensible: bool = False
    ):
        """Opens the folder of the job.

        Args:
          job: the call of the study.
          settings: of all runs.
          described: everything else that the runs depend on, as JSON values.
          extensible: whether a later call with the same settings may add runs, of any tasks and optimizers.
        """
        self._job, self._settings, self._extensible = job, settings, extensible
        everything = {
            **described,
            **settings._asdict(),
            **({} if extensible else {"task": job.selection.task, "optimizer": job.selection.optimizer}),
            "version": greedylr_jax.__version__,
            "row_format": _ROW_FORMAT,
        }
        self._store = RunStore(job.out, everything, fresh=job.fresh)
        self._engines: dict[tuple[str, str], Engine] = {}

    @property
    def num_compilations(self) -> int:
        """Number of training programs compiled so far by calls with ``keep_programs``."""
        return sum(engine.num_compilations for engine in self._engines.values())

    def train(self, groups: Sequence[Group], *, keep_programs: bool = False) -> pl.DataFrame:
        """Trains the runs that are not stored yet and returns all rows so far."""
        engines = self._engines if keep_programs else None
        run_sweep(
            groups, self._settings, self._store, self._job.console, address=self._job.address, engines=engines
        )
        return self._store.rows()

    def finish(self) -> pl.DataFrame:
        """Writes all rows to ``runs.parquet`` and returns them."""
        return self._store.finish(extensible=self._extensible)


def read_published(name: str) -> pl.DataFrame:
    """The numbers that a paper printed, from ``published/NAME.csv``."""
    return pl.read_csv(Path(__file__).parent / "published" / f"{name}.csv")


def line_style(schedule: str) -> dict[str, Any]:
    """Keyword arguments of ``Axes.plot`` for a schedule; GreedyLR's line is thicker than the others."""
    return {**parse(schedule)[0].look.matplotlib(), "lw": 2 if schedule == GREEDYLR else 1.2}


def publish(
    job: Job,
    title: str,
    text: str,
    *,
    tables: Mapping[str, pl.DataFrame],
    figures: Mapping[str, plt.Figure],
    sections: Sequence[html.Section],
    recomputed_by: str,
    schedules: Sequence[str] = (),
) -> None:
    """Writes tables as CSV, figures as PNG, and ``report.html`` into the job's folder.

    Args:
      job: the call of the study.
      title: of the report.
      text: what was trained and what the columns mean.
      tables: by file name without suffix.
      figures: by file name without suffix.
      sections: of the report.
      recomputed_by: the functions that compute every number of the report from ``runs.parquet``.
      schedules: what the report compares, whose sources it lists.
    """
    for name, table in tables.items():
        write_atomically(job.out / f"{name}.csv", table.write_csv)
    for name, figure in figures.items():
        drawing.save(figure, job.out / f"{name}.png")
    source = f"All numbers are computed from runs.parquet by {recomputed_by}. Command: {job.call}."
    if schedules:
        sections = [*sections, sources(schedules)]
    page = job.out / "report.html"
    html.write_page(page, title, f"{text} {source}", [*sections, *_settings_section(job.out)])
    job.console.print(f"Tables, figures and runs.parquet are in {job.out}.")
    job.console.print(f"Report: {page.resolve()}", soft_wrap=True)


def sources(schedules: Sequence[str]) -> html.Section:
    """A section of a report that lists where each schedule is described."""
    rows = []
    for name in dict.fromkeys(schedules):
        entry, _ = parse(name)
        has_label = name == entry.name and name != entry.label
        rows.append((f"{name} ({entry.label})" if has_label else name, entry.source))
    return html.Section("Schedules and rules", "", [html.Table(("schedule", "source"), rows)])


def _settings_section(folder: Path) -> list[html.Section]:
    """The stored settings as a table; nothing if the study stores none."""
    path = folder / "settings.json"
    if not path.exists():
        return []
    rows = [(name, json.dumps(value)) for name, value in json.loads(path.read_text()).items()]
    return [html.Section("Settings", "", [html.Table(("setting", "value"), rows)])]
