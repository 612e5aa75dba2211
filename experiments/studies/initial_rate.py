"""How schedules and rules cope with an initial rate from 1/1000 to 1000 times the best one.

The papers' rules are sold as freeing the user from the choice of a rate. Here each is given seven initial
rates, the same for all, with the same seeds and batches.
"""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import plotly.graph_objects as go
import polars as pl
from rich import box
from rich.console import Console
from rich.table import Table

import greedylr_jax
from experiments import html
from experiments.engine import make_specs
from experiments.store import RunStore, write_atomically
from experiments.sweep import Group, run_sweep
from experiments.tasks import make_task
from experiments.tasks.base import Task

FACTORS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
SCHEDULES = ("constant", "cosine", "knee", "plateau", "GreedyLR", "hypergradient", "LRTuner", "polling")
OPTIMIZERS = ("adamw", "sgd", "adagrad")
TUNING_SEEDS = (1000, 1001)
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"tasks": ("digits-mlp", "mnist1d-mlp"), "steps": 1000, "seeds": 3},
    "full": {"tasks": ("digits-mlp", "mnist1d-mlp", "digits"), "steps": 2000, "seeds": 10},
}
# Okabe and Ito's palette.
COLORS = ("#56B4E9", "#0072B2", "#CC79A7", "#999999", "#D55E00", "#E69F00", "#F0E442", "#009E73")


_EXPLANATION = (
    "Median test accuracy in percent. The best rate of each task and optimizer is that of the cosine "
    "schedule, of a grid of half decades, on seeds that are not reported. Polling takes seven more forward "
    "passes a step than the others; nothing here is corrected for that. All numbers follow from runs.parquet "
    "by experiments.studies.initial_rate.summarize. "
    "Made by: python -m experiments study initial-rate --preset {preset}."
)


def run(preset: str, out: Path, console: Console) -> None:
    """Trains all runs, and leaves rows, table, figure and report in ``out``; goes on where it stopped."""
    chosen = PRESETS[preset]
    steps, seeds = chosen["steps"], chosen["seeds"]
    settings = chosen | {
        "factors": FACTORS,
        "schedules": SCHEDULES,
        "optimizers": OPTIMIZERS,
        "version": greedylr_jax.__version__,
    }
    store, engines = RunStore(out, settings), {}
    pairs = [(make_task(name), optimizer) for name in chosen["tasks"] for optimizer in OPTIMIZERS]
    tuning = [
        Group(task, name, make_specs(("cosine",), _grid(task, name), TUNING_SEEDS)) for task, name in pairs
    ]
    run_sweep(tuning, steps, store, console, engines)
    best = best_rates(store.rows())
    groups = [
        Group(
            task,
            name,
            make_specs(SCHEDULES, [best[task.name, name] * factor for factor in FACTORS], range(seeds)),
        )
        for task, name in pairs
    ]
    run_sweep(groups, steps, store, console, engines)
    runs = store.finish()

    table = summarize(runs)
    _print(table, console)
    write_atomically(out / "table.csv", table.write_csv)
    title = f"Initial rates: {steps} steps, {seeds} seeds"
    figure = draw(table, title)
    write_atomically(out / "initial_rate.png", lambda path: figure.savefig(path, dpi=150))
    plt.close(figure)
    html.write_page(
        out / "report.html",
        title,
        _EXPLANATION.format(preset=preset),
        _sections(table),
    )
    console.print(f"Table, figure, rows and report.html are in {out}.")


def _grid(task: Task, optimizer: str) -> list[float]:
    """Half decades around the middle one of the rates that the task names."""
    middle = task.learning_rates[optimizer][1]
    return [float(middle * 10 ** (exponent / 2)) for exponent in range(-2, 5)]


def best_rates(runs: pl.DataFrame) -> dict[tuple[str, str], float]:
    """For each (task, optimizer) the rate with the highest mean test accuracy on the tuning seeds."""
    tuned = runs.filter(pl.col("seed").is_in(TUNING_SEEDS))
    means = tuned.group_by(["task", "optimizer", "learning_rate"]).agg(pl.col("test_accuracy").mean())
    best = means.sort(["test_accuracy", "learning_rate"], descending=[True, False]).group_by(
        ["task", "optimizer"], maintain_order=True
    )
    return {key: cell["learning_rate"][0] for key, cell in best}


def summarize(runs: pl.DataFrame) -> pl.DataFrame:
    """One row for each task, optimizer, schedule and factor.

    Args:
      runs: one row a run, as ``runs.parquet`` holds them, those of the tuning seeds among them.

    Returns:
      A frame with ``task``, ``optimizer``, ``schedule``, ``factor`` (of the best rate) and the median, least
      and greatest test accuracy over the seeds, in percent.
    """
    rows, best = [], best_rates(runs)
    reported = runs.filter(~pl.col("seed").is_in(TUNING_SEEDS))
    keys = ["task", "optimizer", "schedule", "learning_rate"]
    for (task, optimizer, schedule, rate), cell in reported.group_by(keys, maintain_order=True):
        ratio = rate / best[task, optimizer]
        accuracy = 100 * cell["test_accuracy"].to_numpy()
        rows.append(
            {
                "task": task,
                "optimizer": optimizer,
                "schedule": schedule,
                "factor": FACTORS[int(np.argmin(np.abs(np.log(np.array(FACTORS) / ratio))))],
                "accuracy": float(np.median(accuracy)),
                "accuracy_low": float(accuracy.min()),
                "accuracy_high": float(accuracy.max()),
            }
        )
    return pl.DataFrame(rows)


def _cells(table: pl.DataFrame) -> list[tuple[str, str, list[list[str]]]]:
    """For each task and optimizer the rows of the printed table: a schedule and its accuracies."""
    result = []
    for (task, optimizer), part in table.group_by(["task", "optimizer"], maintain_order=True):
        rows = []
        for schedule in SCHEDULES:
            own = part.filter(pl.col("schedule") == schedule).sort("factor")["accuracy"].to_list()
            rows.append([schedule, *(f"{value:.1f}" for value in own), f"{min(own):.1f}"])
        result.append((task, optimizer, rows))
    return result


_HEADERS = ("schedule", *(f"x{factor:g}" for factor in FACTORS), "worst")


def _print(table: pl.DataFrame, console: Console) -> None:
    for task, optimizer, rows in _cells(table):
        printed = Table(title=f"{task}, {optimizer}: median test accuracy, %", box=box.SIMPLE_HEAD)
        for header in _HEADERS:
            printed.add_column(header, justify="left" if header == "schedule" else "right", no_wrap=True)
        for row in rows:
            printed.add_row(*row)
        console.print(printed)


def draw(table: pl.DataFrame, title: str) -> plt.Figure:
    """Accuracy against the initial rate, a panel for each task and optimizer."""
    panels = list(table.group_by(["task", "optimizer"], maintain_order=True))
    columns = len(OPTIMIZERS)
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.4 * columns, 3.4 * rows), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, ((task, optimizer), part) in zip(grid.flat, panels, strict=False):
        for schedule, color in zip(SCHEDULES, COLORS, strict=True):
            own = part.filter(pl.col("schedule") == schedule).sort("factor")
            axes.plot(own["factor"], own["accuracy"], color=color, lw=1.6, marker="o", ms=3, label=schedule)
            axes.fill_between(
                own["factor"], own["accuracy_low"], own["accuracy_high"], color=color, alpha=0.12, lw=0
            )
        axes.set_xscale("log")
        axes.set_title(f"{task}, {optimizer}", fontsize=10)
        axes.grid(alpha=0.25, lw=0.5)
    for axes in grid[-1]:
        axes.set_xlabel("initial rate / best rate")
    for axes in grid[:, 0]:
        axes.set_ylabel("test accuracy, %")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"{title}; line: median, band: least to greatest", fontsize=12)
    return figure


def _sections(table: pl.DataFrame) -> list[html.Section]:
    sections = []
    for task, optimizer, rows in _cells(table):
        part = table.filter((pl.col("task") == task) & (pl.col("optimizer") == optimizer))
        figure = go.Figure()
        for schedule, color in zip(SCHEDULES, COLORS, strict=True):
            own = part.filter(pl.col("schedule") == schedule).sort("factor")
            figure.add_scatter(
                x=own["factor"].to_list(), y=own["accuracy"].to_list(), name=schedule, line_color=color
            )
        figure.update_xaxes(type="log", title="initial rate / best rate", dtick=1)
        figure.update_yaxes(title="test accuracy, %")
        figure.update_layout(hovermode="x unified", height=420, margin={"t": 20})
        sections.append(html.Section(f"{task}, {optimizer}", "", [figure, html.Table(_HEADERS, rows)]))
    return sections
