"""Table 1 and figures 2 and 3 of "Automated learning rate scheduling with in-training information": factor
polling against common schedules, the number of factors, and the number of batches that evaluate them.

The paper trains a ResNet-18 on CIFAR-10 and CIFAR-100 for 100 epochs from a rate of 0.005 and polls once per
epoch; this study trains networks on digits and polls once per epoch, too. One variant polls at every step.
The paper does not name its optimizer; this study uses SGD. It includes the paper's last experiment, an
initial rate 200 times too large. :mod:`experiments.studies.polling_ablation` compares the settings that the
paper leaves open.
"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import polars as pl

from experiments.reporting import drawing, html
from experiments.reporting.summary import confidence_interval, interval_text
from experiments.reporting.tables import print_table
from experiments.studies.base import Job, Sweep, publish
from experiments.studies.tuning import TUNING_SEEDS, best_rates, reported
from experiments.tasks import make_task
from experiments.training.engine import Settings, make_specs
from experiments.training.schedules import SCHEDULES as REGISTRY
from experiments.training.sweep import Group

TASKS = ("digits-resnet", "digits")
OPTIMIZER = "sgd"
FACTORS = ("polling-3", "polling-5", "polling")
BATCHES = ("polling-5", "polling-5-4batches", "polling-5-16batches")
PAPER_VARIANT = "polling-5"  # "our scheduler with 5 factors"
# The paper's Table 1, test accuracy on CIFAR-10 in percent.
PRINTED = {"constant": 83.5, "linear": 85.2, "cosine": 85.0, "step": 84.4, PAPER_VARIANT: 87.0}
GRID = (0.01, 0.03, 0.1, 0.3, 1.0)
TOO_LARGE = 200.0
EVALUATIONS = 20
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"steps": 300, "seeds": 3},
    "full": {"steps": 2000, "seeds": 10},
}
SCHEDULES = (
    "constant",
    "linear",
    "cosine",
    "step",
    "polling-3",
    "polling-5",
    "polling",
    "polling-5-4batches",
    "polling-5-16batches",
)
EVERY_STEP = f"{PAPER_VARIANT}(every=1)"
BEST, LARGE = "best", f"{TOO_LARGE:g} x best"  # labels of the runs: their initial rate


def run(job: Job) -> None:
    """Trains all runs and writes rows, table, figures and report; resumes an interrupted job."""
    chosen = PRESETS[job.preset]
    sweep = Sweep(job, Settings(chosen["steps"], EVALUATIONS), {"preset": chosen, "schedules": SCHEDULES})
    tasks, optimizer = job.tasks(TASKS), job.one_optimizer(OPTIMIZER)
    tuning = [Group(task, optimizer, make_specs(("cosine",), GRID, TUNING_SEEDS)) for task in tasks]
    best = best_rates(sweep.train(tuning, keep_programs=True))
    seeds = range(chosen["seeds"])
    groups = []
    for task in tasks:
        rate = best[task, optimizer]
        named = {name: at_paper_cadence(name, make_task(task).steps_per_epoch) for name in SCHEDULES}
        specs = make_specs((*named.values(), EVERY_STEP), (rate,), seeds, label=BEST)
        too_large = ("constant", *FACTORS)
        specs += make_specs([named[name] for name in too_large], (TOO_LARGE * rate,), seeds, label=LARGE)
        specs += make_specs((EVERY_STEP,), (TOO_LARGE * rate,), seeds, label=LARGE)
        groups.append(Group(task, optimizer, specs))
    sweep.train(groups, keep_programs=True)
    runs = sweep.finish()
    table = summarize(runs)
    print_table(job.console, "Factor polling", _HEADERS, _cells(table), left=2)
    publish(
        job,
        "Factor polling",
        f"{chosen['steps']} steps, {chosen['seeds']} seeds, {optimizer}; polls: once per epoch, in one "
        "variant at every step; initial rate: the best of a grid "
        "for the cosine schedule on seeds that are not reported, and 200 times that rate. A step with n "
        "factors costs n more forward passes on each evaluation batch; the results are not corrected for "
        "that. Difference: from the constant rate, paired by seed.",
        tables={"table": table},
        figures={"fig2_factors": draw(runs, FACTORS), "fig3_batches": draw(runs, BATCHES)},
        sections=_sections(runs, table),
        recomputed_by="experiments.studies.polling.summarize",
        schedules=SCHEDULES,
    )


def at_paper_cadence(name: str, steps_per_epoch: int) -> str:
    """The name of a schedule, which polls once per epoch if it is a variant of polling.

    Examples:
      >>> at_paper_cadence("polling-5", 22), at_paper_cadence("cosine", 22)
      ('polling-5(every=22)', 'cosine')
    """
    return f"{name}(every={steps_per_epoch})" if name.startswith("polling") else name


def _label(schedule: str) -> str:
    """The label of a schedule in tables and figures, without the cadence of the paper."""
    label = REGISTRY[schedule.partition("(")[0]].label
    return f"{label}, every step" if schedule == EVERY_STEP else label


def _named(runs: pl.DataFrame) -> pl.DataFrame:
    """The reported runs; those at the cadence of the paper by the name of the variant alone."""
    name = pl.col("schedule")
    short = pl.when(name == EVERY_STEP).then(name).otherwise(name.str.split("(").list.first())
    return reported(runs).with_columns(schedule=short)


def summarize(runs: pl.DataFrame) -> pl.DataFrame:
    """One row for each task, initial rate and schedule.

    Returns:
      A frame with ``task``, ``start`` (the initial rate: :data:`BEST` or :data:`LARGE`), ``schedule``, mean
      and standard deviation of the final held-out accuracy in percent (``accuracy``, ``deviation``),
      ``difference`` from the constant rate with its 95% confidence interval, and the mean held-out loss at
      the end (``loss``).
    """
    rows = []
    for (task, start), cell in _named(runs).group_by(["task", "label"], maintain_order=True):
        baseline = cell.filter(pl.col("schedule") == "constant").sort("seed")["test_metric"]
        for (schedule,), own in cell.group_by(["schedule"], maintain_order=True):
            metric = own.sort("seed")["test_metric"]
            differences = 100 * (metric - baseline).to_numpy()
            low, high = confidence_interval(differences)
            rows.append(
                {
                    "task": task,
                    "start": start,
                    "schedule": schedule,
                    "accuracy": 100 * float(metric.mean()),
                    "deviation": 100 * float(metric.std()),
                    "difference": float(differences.mean()),
                    "difference_low": low,
                    "difference_high": high,
                    "loss": float(own["test_loss"].mean()),
                }
            )
    return pl.DataFrame(rows)


_HEADERS = (
    "task",
    "schedule",
    "initial rate",
    "accuracy, %",
    "difference [95% CI]",
    "loss",
    "paper, CIFAR-10",
)


def _cells(table: pl.DataFrame) -> list[list[str]]:
    return [
        [
            row["task"],
            _label(row["schedule"]),
            row["start"],
            f"{row['accuracy']:.2f} ({row['deviation']:.2f})",
            interval_text(row, "+.2f"),
            f"{row['loss']:.3g}",
            str(PRINTED.get(row["schedule"], "")) if row["start"] == BEST else "",
        ]
        for row in table.iter_rows(named=True)
    ]


def _histories(runs: pl.DataFrame, task: str, schedule: str, column: str) -> np.ndarray:
    """The mean history over seeds from the best initial rate."""
    cell = _named(runs).filter(task=task, schedule=schedule, label=BEST)
    return np.array(cell[column].to_list(), float).mean(axis=0)


def draw(runs: pl.DataFrame, schedules: tuple[str, ...]) -> plt.Figure:
    """Held-out loss above learning rate for the constant schedule and some variants of polling."""
    tasks = runs["task"].unique(maintain_order=True)
    figure, panels = drawing.panels(2 * len(tasks), len(tasks), width=5.2, height=3.4)
    for column, task in enumerate(tasks):
        for row, (name, title) in enumerate((("test_losses", "held-out loss"), ("rate", "learning rate"))):
            axes = panels[row * len(tasks) + column]
            for schedule in ("constant", *schedules):
                values = _histories(runs, task, schedule, name)
                steps = drawing.percent_of_steps(len(values))
                look = REGISTRY[schedule].look
                axes.plot(steps, values, **look.matplotlib(), lw=1.4, label=_label(schedule))
            axes.set_yscale("log")
            axes.set_title(task, fontsize=10)
            axes.set_xlabel("steps, %")
            axes.set_ylabel(title)
    drawing.add_legend(figure, panels[0])
    figure.suptitle("Factor polling, mean over seeds", fontsize=12)
    return figure


def _sections(runs: pl.DataFrame, table: pl.DataFrame) -> list[html.Section]:
    sections = []
    for task in runs["task"].unique(maintain_order=True):
        parts: list[Any] = [html.Table(_HEADERS, _cells(table.filter(pl.col("task") == task)))]
        for name, title in (("test_losses", "held-out loss"), ("rate", "learning rate")):
            curves = []
            for schedule in SCHEDULES:
                values = _histories(runs, task, schedule, name)
                steps = drawing.percent_of_steps(len(values))
                entry = REGISTRY[schedule]
                curves.append(html.Curve(entry.label, steps, values, entry.look.plotly()))
            parts.append(html.line_figure(curves, "steps, %", title, y_log=True))
        sections.append(html.Section(task, "Curves: from the best initial rate, mean over seeds.", parts))
    return sections
