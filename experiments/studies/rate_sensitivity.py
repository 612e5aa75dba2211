"""Accuracy of schedules and rules for initial rates from 1/1000 to 1000 times the best one.

The papers claim that their rules remove the choice of a learning rate. Here every schedule starts from the
same seven initial rates, with the same seeds and batches.
"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
from rich.console import Console

from experiments.reporting import drawing, html
from experiments.reporting.tables import print_table
from experiments.studies.base import Job, Sweep, publish
from experiments.studies.tuning import TUNING_SEEDS, best_rates, reported
from experiments.tasks.base import LEARNING_RATES
from experiments.training.engine import RunSpec, Settings, make_specs
from experiments.training.schedules import SCHEDULES as REGISTRY
from experiments.training.sweep import Group

FACTORS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
SCHEDULES = (
    "constant",
    "linear",
    "cosine",
    "knee",
    "plateau",
    "GreedyLR",
    "trend",
    "hypergradient",
    "LRTuner",
    "polling",
    "ARC",
    "schedule-free",
    "mechanic",
    "dog-guess",
    "prodigy-guess",
    "auto",
)
HIGHLIGHTED = ("auto", "cosine")  # drawn with the range over seeds
OPTIMIZERS = ("adamw", "sgd", "adagrad")
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "tasks": ("digits-mlp", "mnist1d-mlp", "mnist1d-residual"),
        "schedules": SCHEDULES,
        "steps": 1000,
        "seeds": 5,
    },
    # The other kinds of tasks, with the schedules that do not need further forward passes.
    "full": {
        "tasks": (
            "digits-vit",
            "digits",
            "digits-resnet",
            "tagging",
            "translation-de",
            "question-answering",
        ),
        "schedules": ("constant", "cosine", "GreedyLR", "trend", "hypergradient", "auto"),
        "steps": 1000,
        "seeds": 5,
    },
}

_EXPLANATION = (
    "Median test accuracy in percent. The best rate of each task and optimizer is the best rate of the "
    "cosine schedule on a grid with two rates per factor of ten, on seeds that are not reported. Polling "
    "needs seven more forward passes per step than the others; the results are not corrected for that. "
    "Prodigy and schedule-free are variants of Adam whatever the optimizer, and DoG of SGD; for Prodigy "
    "and DoG the initial rate is their initial estimate. auto_lr has no initial rate: its "
    "runs are the same at all of them."
)


def run(job: Job) -> None:
    """Trains all runs and writes rows, tables, figures and report; resumes an interrupted job."""
    chosen = PRESETS[job.preset]
    steps, seeds = chosen["steps"], chosen["seeds"]
    optimizers = job.optimizers(OPTIMIZERS)
    described = {"preset": chosen, "factors": FACTORS, "optimizers": optimizers}
    sweep = Sweep(job, Settings(steps), described)
    pairs = [(task, optimizer) for task in job.tasks(chosen["tasks"]) for optimizer in optimizers]
    tuning = [Group(*pair, make_specs(("cosine",), _grid(pair[1]), TUNING_SEEDS)) for pair in pairs]
    best = best_rates(sweep.train(tuning, keep_programs=True))
    groups = [
        Group(
            *pair,
            [
                RunSpec(schedule, best[pair] * factor, seed, label=f"{factor:g}")
                for seed in range(seeds)
                for factor in FACTORS
                for schedule in chosen["schedules"]
            ],
        )
        for pair in pairs
    ]
    sweep.train(groups, keep_programs=True)
    report(job, sweep.finish(), f"Initial rates: {steps} steps, {seeds} seeds")


def report(job: Job, runs: pl.DataFrame, title: str) -> None:
    """Prints and writes tables, figures and the report."""
    table = summarize(runs)
    _print(table, job.console)
    publish(
        job,
        title,
        _EXPLANATION,
        tables={"table": table},
        figures={"rate_sensitivity": draw(table, title)},
        sections=_sections(table),
        recomputed_by="experiments.studies.rate_sensitivity.summarize",
        schedules=_shown(table),
    )


def _grid(optimizer: str) -> list[float]:
    """Two rates per factor of ten, from 1/10 to 100 times the middle one of the common rates."""
    middle = LEARNING_RATES[optimizer][1]
    return [float(middle * 10 ** (exponent / 2)) for exponent in range(-2, 5)]


def summarize(runs: pl.DataFrame) -> pl.DataFrame:
    """One row for each task, optimizer, schedule and factor.

    Args:
      runs: the rows of ``runs.parquet``, including those of the tuning seeds.

    Returns:
      A frame with ``task``, ``optimizer``, ``schedule``, ``factor`` (initial rate over the best rate), the
      median, minimum and maximum of the test accuracy over the seeds, in percent.
    """
    rows = []
    keys = ["task", "optimizer", "schedule", "factor"]
    for key, cell in _with_factors(runs).group_by(keys, maintain_order=True):
        accuracy = cell["accuracy"].to_numpy()
        rows.append(
            dict(zip(keys, key, strict=True))
            | {
                "accuracy": float(np.median(accuracy)),
                "accuracy_low": float(accuracy.min()),
                "accuracy_high": float(accuracy.max()),
            }
        )
    return pl.DataFrame(rows)


def _with_factors(runs: pl.DataFrame) -> pl.DataFrame:
    """The reported runs with their ``factor`` of the best rate and ``accuracy`` in percent."""
    return reported(runs).with_columns(
        factor=pl.col("label").cast(pl.Float64), accuracy=100 * pl.col("test_metric").cast(pl.Float64)
    )


def _cells(table: pl.DataFrame) -> list[tuple[str, str, list[list[str]]]]:
    """For each task and optimizer the rows of the printed table, a schedule with its accuracies."""
    result = []
    for (task, optimizer), part in table.group_by(["task", "optimizer"], maintain_order=True):
        rows = []
        for schedule in _shown(part):
            own = part.filter(pl.col("schedule") == schedule).sort("factor")["accuracy"].to_list()
            rows.append([schedule, *(f"{value:.1f}" for value in own), f"{min(own):.1f}"])
        result.append((task, optimizer, rows))
    return result


def _shown(part: pl.DataFrame) -> list[str]:
    """The schedules of the rows, in the order of :data:`SCHEDULES`."""
    present = set(part["schedule"])
    return [schedule for schedule in SCHEDULES if schedule in present]


_HEADERS = ("schedule", *(f"x{factor:g}" for factor in FACTORS), "worst")


def _print(table: pl.DataFrame, console: Console) -> None:
    for task, optimizer, rows in _cells(table):
        print_table(console, f"{task}, {optimizer}: median test accuracy, %", _HEADERS, rows)


def draw(table: pl.DataFrame, title: str) -> plt.Figure:
    """Accuracy against the initial rate, a panel for each task and optimizer."""
    parts = list(table.group_by(["task", "optimizer"], maintain_order=True))
    columns = table["optimizer"].n_unique()
    figure, panels = drawing.panels(len(parts), columns, sharey=True)
    for axes, ((task, optimizer), part) in zip(panels, parts, strict=True):
        for schedule in _shown(part):
            entry = REGISTRY[schedule]
            own = part.filter(pl.col("schedule") == schedule).sort("factor")
            style = {**entry.look.matplotlib(), "lw": 2.4 if schedule == "auto" else 1.4}
            axes.plot(own["factor"], own["accuracy"], label=entry.label, **style)
            if schedule in HIGHLIGHTED:
                band = own["accuracy_low"], own["accuracy_high"]
                axes.fill_between(own["factor"], *band, color=entry.look.color, alpha=0.12, lw=0)
        axes.set_xscale("log")
        axes.set_title(f"{task}, {optimizer}", fontsize=10)
        axes.set_xlabel("initial rate / best rate")
        axes.set_ylabel("test accuracy, %")
    drawing.add_legend(figure, panels[0], columns=2 * columns + 1)
    bands = f"band of {' and '.join(HIGHLIGHTED)}: minimum to maximum"
    figure.suptitle(f"{title}; line: median, {bands}", fontsize=12)
    return figure


def _sections(table: pl.DataFrame) -> list[html.Section]:
    sections = []
    for task, optimizer, rows in _cells(table):
        part = table.filter((pl.col("task") == task) & (pl.col("optimizer") == optimizer))
        curves = []
        for schedule in _shown(part):
            entry = REGISTRY[schedule]
            own = part.filter(pl.col("schedule") == schedule).sort("factor")
            curves.append(html.Curve(entry.label, own["factor"], own["accuracy"], entry.look.plotly()))
        figure = html.line_figure(curves, "initial rate / best rate", "test accuracy, %", x_log=True)
        sections.append(html.Section(f"{task}, {optimizer}", "", [figure, html.Table(_HEADERS, rows)]))
    return sections
