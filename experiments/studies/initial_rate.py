"""Accuracy of schedules and rules for initial rates from 1/1000 to 1000 times the best one.

The papers claim that their rules remove the choice of a learning rate. Here every schedule starts from the
same seven initial rates, with the same seeds and batches.
"""

from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
from rich.console import Console

from experiments.reporting import drawing, html
from experiments.reporting.summary import confidence_interval
from experiments.reporting.tables import print_table
from experiments.studies.base import Job, Sweep, publish
from experiments.studies.tuning import TUNING_SEEDS, best_rates, reported
from experiments.tasks.base import LEARNING_RATES
from experiments.tasks.suite import TUNED_ON, half
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
RULE, BASELINE = "auto", "cosine"  # the pair that the conclusion compares
# Tasks on which the settings of auto_lr, or of an earlier version, were chosen or rejected.
DEVELOPMENT = TUNED_ON | {entry.task for entry in half("development")}
TOLERANCE = 2.0  # points of accuracy
LOSS_TOLERANCE = 1.1  # times the held-out loss
OPTIMIZERS = ("adamw", "sgd", "adagrad")
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "tasks": ("digits-mlp", "mnist1d-mlp", "mnist1d-residual"),
        "schedules": SCHEDULES,
        "steps": 1000,
        "seeds": 5,
    },
    # The other kinds of tasks, with the two schedules that the conclusion compares.
    "full": {
        "tasks": (
            "digits-vit",
            "digits",
            "digits-resnet",
            "tagging",
            "translation-de",
            "question-answering",
        ),
        "schedules": (BASELINE, RULE),
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
    every = gaps(runs)
    _print(table, job.console)
    headers, cells = _gap_cells(every)
    print_table(job.console, _GAPS, headers, cells, left=2)
    conclusion = conclude(every)
    job.console.print(conclusion)
    figures = {"initial_rate": draw(table, title)}
    sections = [html.Section(_GAPS, conclusion, [html.Table(headers, cells)])]
    if large := [gap for gap in every if gap.worst > TOLERANCE]:
        figures["where_it_fails"] = draw_large(runs, large)
        reasons = explain(runs, large)
        job.console.print(reasons)
        sections.append(html.Section("Gaps above the tolerance", f"{reasons} See where_it_fails.png.", []))
    publish(
        job,
        title,
        _EXPLANATION,
        tables={"table": table, "gaps": pl.DataFrame(every)},
        figures=figures,
        sections=[*sections, *_sections(table)],
        recomputed_by="experiments.studies.initial_rate.summarize, gaps and explain",
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
      median, minimum and maximum of the test accuracy over the seeds, in percent, and the median test loss.
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
                "test_loss": _median_loss(cell),
            }
        )
    return pl.DataFrame(rows)


def _with_factors(runs: pl.DataFrame) -> pl.DataFrame:
    """The reported runs with their ``factor`` of the best rate and ``accuracy`` in percent."""
    return reported(runs).with_columns(
        factor=pl.col("label").cast(pl.Float64), accuracy=100 * pl.col("test_metric").cast(pl.Float64)
    )


def _median_loss(cell: pl.DataFrame) -> float:
    """The median held-out loss; losses that are not finite count as infinite."""
    losses = cell["test_loss"].cast(pl.Float64).to_numpy()
    return float(np.median(np.where(np.isfinite(losses), losses, np.inf)))


class Gap(NamedTuple):
    """The gap between ``auto_lr`` and cosine from its best initial rate, for one task and optimizer."""

    task: str
    optimizer: str
    rule_factor: float  # of the initial rate from which auto_lr is worst
    baseline_factor: float  # of the initial rate from which cosine is best
    best: float  # median accuracy of cosine from there, percent
    worst: float  # best minus the median accuracy of auto_lr from rule_factor, percentage points
    loss: float  # maximum held-out loss of auto_lr over the minimum of cosine
    middle: float  # best minus auto_lr's median over the initial rates, mean over seeds, percentage points
    middle_low: float  # its 95% confidence interval over seeds
    middle_high: float


def gaps(runs: pl.DataFrame) -> list[Gap]:
    """The gap of each pair of a task and an optimizer, from the same rows as :func:`summarize`."""
    result = []
    every = _with_factors(runs)
    for (task, optimizer), table in summarize(runs).group_by(["task", "optimizer"], maintain_order=True):
        rule = table.filter(schedule=RULE).sort("accuracy")
        baseline = table.filter(schedule=BASELINE).sort("accuracy")
        best = baseline["factor"][-1]
        own = every.filter(task=task, optimizer=optimizer)
        median = own.filter(schedule=RULE).group_by("seed").agg(rule=pl.col("accuracy").median())
        pairs = median.join(own.filter(schedule=BASELINE, factor=best), on="seed")
        below = (pairs["accuracy"] - pairs["rule"]).to_numpy()
        result.append(
            Gap(
                task,
                optimizer,
                rule_factor=rule["factor"][0],
                baseline_factor=best,
                best=baseline["accuracy"][-1],
                worst=baseline["accuracy"][-1] - rule["accuracy"][0],
                loss=_ratio(rule["test_loss"].max(), baseline["test_loss"].min()),
                middle=float(below.mean()),
                **dict(zip(("middle_low", "middle_high"), confidence_interval(below), strict=True)),
            )
        )
    return result


def _ratio(loss: float, minimum: float) -> float:
    """``loss / minimum`` for losses >= 0; for a minimum of 0 it is 1 if both are 0 and infinite otherwise."""
    if minimum > 0:
        return loss / minimum
    return 1.0 if loss == minimum else float("inf")


def conclude(every: list[Gap]) -> str:
    """How often ``auto_lr`` from its worst and its median initial rate equals cosine from its best one."""
    sentences = []
    for name, is_development in (("development tasks", True), ("other tasks", False)):
        own = [gap for gap in every if (gap.task in DEVELOPMENT) == is_development]
        if not own:
            continue
        near = [gap.worst <= TOLERANCE for gap in own]
        near_by_loss = [gap.loss <= LOSS_TOLERANCE for gap in own]
        either = [a or b for a, b in zip(near, near_by_loss, strict=True)]
        not_below = [not gap.middle_low > 0 for gap in own]
        sentences.append(
            f"Over {len(own)} pairs of the {name}, the worst accuracy of auto_lr over the {len(FACTORS)} "
            f"initial rates is within {TOLERANCE:g} points of cosine at its best rate for {sum(near)} "
            f"(maximum gap {max(gap.worst for gap in own):.1f}), its held-out loss is within "
            f"{LOSS_TOLERANCE - 1:.0%} of the minimum of cosine for {sum(near_by_loss)}, and at least one "
            f"of them holds for {sum(either)}. Its median over the rates is not significantly (95%) below "
            f"cosine at its best rate for {sum(not_below)} (maximum mean gap "
            f"{max(gap.middle for gap in own):.1f} points)."
        )
    return " ".join(sentences)


def explain(runs: pl.DataFrame, large: list[Gap]) -> str:
    """The learning rate of ``auto_lr`` for the gaps above the tolerance, relative to that of cosine."""
    every = _with_factors(runs)
    sentences = []
    for gap in large:
        own = every.filter(task=gap.task, optimizer=gap.optimizer)
        rule, baseline = (
            np.stack(own.filter(schedule=schedule, factor=factor)["rate"].to_list()).astype(float)
            for schedule, factor in ((RULE, gap.rule_factor), (BASELINE, gap.baseline_factor))
        )
        third = rule.shape[1] // 3  # the search has ended by then
        at, highest = np.median(rule[:, third]), np.median(rule[:, third:].max(axis=1))
        peak, there = np.median(baseline.max(axis=1)), np.median(baseline[:, third])
        sentences.append(
            f"{gap.task}, {gap.optimizer}, x{gap.rule_factor:g}: {gap.worst:.1f} points below. After a "
            f"third of the steps its learning rate is {at / there:.2g} times that of cosine; the maximum "
            f"from then on is {highest / peak:.2g} times the maximum of cosine. Its maximum held-out loss "
            f"is {gap.loss:.2f} times the minimum of cosine."
        )
    return " ".join(sentences)


_GAPS = f"{RULE} from its worst initial rate and {BASELINE} from its best one"


def _gap_cells(every: list[Gap]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Headers and rows of the table of gaps."""
    headers = (
        "task",
        "optimizer",
        f"{BASELINE}, %",
        f"{RULE}, %",
        "points below",
        "loss ratio",
        "median below",
    )
    rows = []
    for gap in every:
        middle = f"{gap.middle:.1f} [{gap.middle_low:.1f}, {gap.middle_high:.1f}]"
        accuracies = (gap.best, gap.best - gap.worst, gap.worst)
        rows.append([gap.task, gap.optimizer, *(f"{x:.1f}" for x in accuracies), f"{gap.loss:.2f}", middle])
    return headers, rows


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
    figure, panels = drawing.panels(len(parts), table["optimizer"].n_unique(), sharey=True)
    for axes, ((task, optimizer), part) in zip(panels, parts, strict=True):
        for schedule in _shown(part):
            entry = REGISTRY[schedule]
            own = part.filter(pl.col("schedule") == schedule).sort("factor")
            style = {**entry.look.matplotlib(), "lw": 2.4 if schedule == RULE else 1.4}
            axes.plot(own["factor"], own["accuracy"], marker="o", ms=3, label=entry.label, **style)
            if schedule in (RULE, BASELINE):
                band = own["accuracy_low"], own["accuracy_high"]
                axes.fill_between(own["factor"], *band, color=entry.look.color, alpha=0.12, lw=0)
        axes.set_xscale("log")
        axes.set_title(f"{task}, {optimizer}", fontsize=10)
        axes.set_xlabel("initial rate / best rate")
        axes.set_ylabel("test accuracy, %")
    drawing.add_legend(figure, panels[0], columns=8)
    bands = f"band of {RULE} and {BASELINE}: minimum to maximum"
    figure.suptitle(f"{title}; line: median, {bands}", fontsize=12)
    return figure


def draw_large(runs: pl.DataFrame, large: list[Gap]) -> plt.Figure:
    """Loss and learning rate of all seeds for the gaps above the tolerance, with those of cosine."""
    every = _with_factors(runs)
    figure, panels = drawing.panels(2 * len(large), 2)
    for gap, pair in zip(large, zip(panels[::2], panels[1::2], strict=True), strict=True):
        for schedule, factor in ((RULE, gap.rule_factor), (BASELINE, gap.baseline_factor)):
            cell = every.filter(task=gap.task, optimizer=gap.optimizer, schedule=schedule, factor=factor)
            for number, run in enumerate(cell.iter_rows(named=True)):
                for axes, name in zip(pair, ("loss", "rate"), strict=True):
                    values = np.array(run[name], float)
                    label = f"{schedule}, x{factor:g}" if number == 0 else None
                    percent = drawing.percent_of_steps(len(values))
                    color = REGISTRY[schedule].look.color
                    axes.plot(percent, values, color=color, lw=1, alpha=0.7, label=label)
        for axes, name in zip(pair, ("training loss", "learning rate"), strict=True):
            axes.set_yscale("log")
            axes.set_title(f"{gap.task}, {gap.optimizer}: {gap.worst:.1f} points below", fontsize=10)
            axes.set_xlabel("% of the steps")
            axes.set_ylabel(name)
            axes.legend(fontsize=8)
    figure.suptitle(f"{RULE} more than {TOLERANCE:g} points below the best of {BASELINE}", fontsize=12)
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
