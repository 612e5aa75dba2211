"""Pre-training and fine-tuning with GreedyLR: the claims of the second GreedyLR paper on small networks.

The paper claims better accuracy, speed and convergence than common schedulers in pre-training and fine-tuning
of models of up to 7B parameters, tighter percentile bands, and recovery from perturbations. This study
fine-tunes the networks of ``python -m experiments pretrain``, which it trains first if they are not in the
user's cache, and repeats a short pre-training, with GreedyLR and common schedules from three initial rates.
In a second set of runs, five consecutive batches in the middle of the training have wrong labels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import polars as pl
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.pretraining import pretrain_for
from experiments.reporting import drawing, html
from experiments.reporting.summary import (
    GREEDYLR,
    confidence_interval,
    interval_text,
    stage_losses,
)
from experiments.reporting.summary import summarize as summarize_task
from experiments.reporting.tables import print_table
from experiments.studies.base import Job, Sweep, line_style, publish
from experiments.tasks import make_task
from experiments.training.engine import Settings, make_specs
from experiments.training.schedules import SCHEDULES as REGISTRY
from experiments.training.sweep import Group

SCHEDULES = ("constant", "linear", "cosine", "warmup", GREEDYLR)
OPTIMIZER = "adamw"
WRONG_BATCHES = 5
_WINDOW = 10  # steps that losses are averaged over
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "network": "quick",
        "tasks": (
            "pretraining-encoder",
            "tagging-finetuned",
            "tagging-lora",
            "tagging-scratch",
            "question-answering-finetuned",
            "summarization-finetuned",
            "translation-fr-finetuned",
            "docstrings-finetuned",
            "docstrings-lora",
            "digits-finetuned",
            "digits-lora",
        ),
        "disturbed": ("tagging-finetuned", "docstrings-finetuned"),
        "steps": 100,
        "seeds": 3,
    },
    "full": {
        "network": "full",
        "tasks": (
            *(f"pretraining-{kind}-full" for kind in ("encoder", "decoder", "image")),
            *(
                f"{kind}-{method}-full"
                for kind in (
                    "tagging",
                    "question-answering",
                    "summarization",
                    "translation-fr",
                    "docstrings",
                    "digits",
                )
                for method in ("finetuned", "lora", "scratch")
            ),
        ),
        "disturbed": tuple(
            f"{kind}-{method}-full"
            for kind in ("tagging", "question-answering", "docstrings", "digits")
            for method in ("finetuned", "lora")
        ),
        "steps": 1000,
        "seeds": 5,
    },
}


def run(job: Job) -> None:
    """Pretrains, trains all runs and writes rows, tables, figures and report; resumes an interrupted job."""
    chosen = PRESETS[job.preset]
    tasks, optimizer = job.tasks(chosen["tasks"]), job.one_optimizer(OPTIMIZER)
    pretrain_for(tasks, job.console)
    steps = chosen["steps"]
    sweep = Sweep(job, Settings(steps), {"preset": chosen, "schedules": SCHEDULES})
    sweep.train([group for task in tasks for group in _groups(task, optimizer, chosen)])
    runs = sweep.finish()

    table = summarize(runs)
    claims, recoveries = compare(runs), recovery_table(runs)
    print_table(job.console, "Every task and initial rate", _HEADERS, _cells(table), left=3)
    print_table(job.console, "Best initial rate of each schedule", _BEST, _best_cells(best_rates(table)))
    if len(recoveries):
        print_table(job.console, "Five batches with wrong labels", _RECOVERY, _recovery_cells(recoveries))
    print_table(job.console, "GreedyLR against each schedule", _CLAIMS, _claim_cells(claims))
    publish(
        job,
        "Fine-tuning and pre-training",
        f"{steps} steps with {optimizer}, {chosen['seeds']} seeds, three initial rates, GreedyLR with its "
        "published settings. Losses are medians over seeds of the mean training loss over the 5% of steps "
        "before a stage; the held-out metric is a median, in percent. Difference: the schedule's final loss "
        "minus GreedyLR's, paired by seed, with its 95% confidence interval, not corrected for multiple "
        "comparisons; positive if GreedyLR's is lower. Band: the highest minus the lowest final loss over "
        "seeds. Rates of low-rank adapters are ten times those of all parameters. " + conclude(claims),
        tables={
            "table": table,
            "best": best_rates(table),
            "claims": claims,
            **({"recovery": recoveries} if len(recoveries) else {}),
        },
        figures={
            "histories": draw_histories(runs),
            "rates": draw_rates(table),
            **({"recovery": draw_recovery(runs)} if len(recoveries) else {}),
        },
        sections=_sections(runs, table, claims, recoveries),
        recomputed_by="experiments.studies.finetune.summarize, best_rates, compare and recovery_table",
        schedules=SCHEDULES,
    )


def _groups(task: str, optimizer: str, chosen: Mapping[str, Any]) -> list[Group]:
    """The runs of a task: undisturbed from three rates, and with wrong labels from the second."""
    rates, seeds = make_task(task).learning_rates[optimizer], range(chosen["seeds"])
    groups = [Group(task, optimizer, make_specs(SCHEDULES, rates, seeds))]
    if task in chosen["disturbed"]:
        disturbed = f"{task}+wrong-labels-at-{chosen['steps'] // 2}"
        groups.append(Group(disturbed, optimizer, make_specs(SCHEDULES, rates[1:2], seeds)))
    return groups


def split(runs: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The undisturbed runs, and those with wrong labels."""
    disturbed = pl.col("task").str.contains("+wrong-labels", literal=True)
    return runs.filter(~disturbed), runs.filter(disturbed)


def summarize(runs: pl.DataFrame) -> pl.DataFrame:
    """One row for each task, initial rate and schedule, without the runs with wrong labels.

    Args:
      runs: the rows of ``runs.parquet``.

    Returns:
      A frame with ``task``, the columns of :func:`experiments.reporting.summary.summarize`, and ``band``: the
      highest minus the lowest final loss over seeds.
    """
    tables = []
    for (task,), own in split(runs)[0].group_by(["task"], maintain_order=True):
        bands = [
            {"learning_rate": rate, "schedule": schedule, "band": _band(cell)}
            for (rate, schedule), cell in own.group_by(["learning_rate", "schedule"], maintain_order=True)
        ]
        table = summarize_task(own).join(pl.DataFrame(bands), on=["learning_rate", "schedule"], how="left")
        tables.append(table.select(pl.lit(task).alias("task"), *table.columns))
    return pl.concat(tables, how="vertical_relaxed")


def final_losses(cell: pl.DataFrame) -> np.ndarray:
    """The final training loss of each run, in the order of the seeds."""
    return np.array(
        [stage_losses(np.array(loss, float))[100] for loss in cell.sort("seed")["loss"].to_list()]
    )


def _band(cell: pl.DataFrame) -> float:
    losses = final_losses(cell)
    return float(np.ptp(losses)) if np.isfinite(losses).all() else math.inf


def best_rates(table: pl.DataFrame) -> pl.DataFrame:
    """For each task and schedule the row of the initial rate with the lowest median of the final loss.

    Returns:
      The rows of :func:`summarize` of these rates, with ``worst``: the metric at the schedule's worst rate.
    """
    keys = ["task", "schedule"]
    worst = table.group_by(keys, maintain_order=True).agg(worst=pl.col("test_metric").min())
    best = table.sort(["loss_100", "learning_rate"]).group_by(keys, maintain_order=True).first()
    order = table.select(keys).unique(maintain_order=True)
    return order.join(best, on=keys, how="left").join(worst, on=keys, how="left")


def compare(runs: pl.DataFrame) -> pl.DataFrame:
    """GreedyLR against each schedule, over the experiments (tasks x initial rates) without wrong labels.

    Returns:
      A frame with ``rate``, the position of the initial rate ("low", "middle", "high"), ``schedule``,
      ``experiments``; ``lower`` and ``higher``: the number in which GreedyLR's final loss is significantly
      lower and higher; ``ratio`` with ``ratio_low`` and ``ratio_high``: the geometric mean over tasks of
      GreedyLR's final loss over the schedule's, and its 95% confidence interval over tasks;
      ``metric``: the mean difference of the held-out metric in points, positive if GreedyLR's is higher, with
      ``metric_low`` and ``metric_high``; ``narrower``: percent of the experiments in which GreedyLR's band is
      narrower.
    """
    cells: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _, own in split(runs)[0].group_by(["task"], maintain_order=True):
        for position, rate in zip(("low", "middle", "high"), sorted(set(own["learning_rate"])), strict=False):
            at_rate = own.filter(learning_rate=rate)
            greedy = at_rate.filter(schedule=GREEDYLR)
            for schedule in (name for name in SCHEDULES if name != GREEDYLR):
                compared = _compare(greedy, at_rate.filter(schedule=schedule))
                cells.setdefault((position, schedule), []).append(compared)
    return pl.DataFrame([_claim(*key, each) for key, each in cells.items()], infer_schema_length=None)


def _compare(greedy: pl.DataFrame, other: pl.DataFrame) -> dict[str, float]:
    """GreedyLR's runs and those of another schedule in one experiment."""
    own, others = final_losses(greedy), final_losses(other)
    low, high = confidence_interval(others - own)
    metrics = [100 * float(np.median(each["test_metric"])) for each in (greedy, other)]
    return {
        "lower": low > 0,
        "higher": high < 0,
        "log": math.log(max(float(np.median(own)), 1e-6) / max(float(np.median(others)), 1e-6)),
        "metric": metrics[0] - metrics[1],
        "narrower": _band(greedy) < _band(other),
    }


def _claim(position: str, schedule: str, cells: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    logs, metrics = (np.array([cell[name] for cell in cells]) for name in ("log", "metric"))
    ratio_low, ratio_high = confidence_interval(logs)
    metric_low, metric_high = confidence_interval(metrics)
    return {
        "rate": position,
        "schedule": schedule,
        "experiments": len(cells),
        "lower": sum(bool(cell["lower"]) for cell in cells),
        "higher": sum(bool(cell["higher"]) for cell in cells),
        "ratio": math.exp(logs.mean()),
        "ratio_low": math.exp(ratio_low),
        "ratio_high": math.exp(ratio_high),
        "metric": float(metrics.mean()),
        "metric_low": metric_low,
        "metric_high": metric_high,
        "narrower": 100 * float(np.mean([cell["narrower"] for cell in cells])),
    }


def conclude(claims: pl.DataFrame) -> str:
    """One sentence for each position of the initial rate."""
    sentences = []
    for (position,), own in claims.group_by(["rate"], maintain_order=True):
        total, lower, higher = (own[name].sum() for name in ("experiments", "lower", "higher"))
        sentences.append(
            f"From the {position} initial rate {GREEDYLR}'s final loss is significantly lower in {lower} and "
            f"significantly higher in {higher} of {total} comparisons (tasks x schedules)."
        )
    return " ".join(sentences)


def recovery(loss: np.ndarray, start: int) -> float:
    """Steps after the last wrong batch until the loss is at or below that before the first one.

    Args:
      loss: the loss before each update, shape (steps,).
      start: step of the first batch with wrong labels.

    Returns:
      The first step at which the mean of 10 losses is at or below the mean of the 10 before ``start``;
      infinite if there is none.

    Examples:
      >>> loss = np.concatenate([np.full(20, 1.0), np.full(5, 9.0), np.full(10, 2.0), np.full(15, 1.0)])
      >>> recovery(loss, 20)
      20.0
    """
    before = np.mean(loss[start - _WINDOW : start]) * (1 + 1e-6)  # rounding
    after = drawing.smooth(loss[start + WRONG_BATCHES :], _WINDOW)
    recovered = np.flatnonzero(after <= before)
    return float(recovered[0] + _WINDOW) if len(recovered) else math.inf


def _start(task: str) -> int:
    return int(task.rpartition("-")[2])


def recovery_table(runs: pl.DataFrame) -> pl.DataFrame:
    """One row for each task with wrong labels and schedule.

    Returns:
      A frame with ``task``, ``schedule``; ``recovery``: the median of :func:`recovery` over seeds, infinite
      if most do not recover; ``recovered``: percent of the seeds that do; ``damage``: the median over seeds
      of the final loss over that of the undisturbed run of the same schedule and seed; ``metric`` and
      ``points_below``: the median held-out metric in percent, and how many points it is below that of the
      undisturbed runs.
    """
    undisturbed, disturbed = split(runs)
    rows = []
    for (task, schedule), cell in disturbed.group_by(["task", "schedule"], maintain_order=True):
        plain = undisturbed.filter(
            task=task.partition("+")[0], schedule=schedule, learning_rate=cell["learning_rate"][0]
        )
        steps = [
            recovery(np.array(loss, float), _start(task)) for loss in cell.sort("seed")["loss"].to_list()
        ]
        metric, before = (100 * float(np.median(each["test_metric"])) for each in (cell, plain))
        rows.append(
            {
                "task": task.partition("+")[0],
                "schedule": schedule,
                "recovery": float(np.percentile(steps, 50, method="nearest")),
                "recovered": 100 * float(np.mean(np.isfinite(steps))),
                "damage": float(np.median(final_losses(cell) / final_losses(plain))),
                "metric": metric,
                "points_below": before - metric,
            }
        )
    return pl.DataFrame(rows, infer_schema_length=None)


_HEADERS = (
    "task",
    "rate",
    "schedule",
    "loss at 10%",
    "50%",
    "100%",
    "band",
    "held-out, %",
    "final loss minus GreedyLR's [95% CI]",
)
_BEST = ("task", "schedule", "best rate", "final loss", "held-out, %", "held-out at the worst rate, %")
_RECOVERY = ("task", "schedule", "recovery, steps", "recovered, %", "damage", "held-out, %", "points below")
_CLAIMS = (
    "against",
    "rate",
    "experiments",
    "lower",
    "higher",
    "ratio of losses [95% CI]",
    "held-out, points [95% CI]",
    "narrower band, %",
)


def _cells(table: pl.DataFrame) -> list[list[str]]:
    return [
        [
            row["task"],
            f"{row['learning_rate']:g}",
            row["schedule"],
            *(f"{row[f'loss_{stage}']:.3g}" for stage in (10, 50, 100)),
            f"{row['band']:.2g}",
            f"{row['test_metric']:.1f}",
            "" if row["difference"] is None else interval_text(row, "+.2g"),
        ]
        for row in table.iter_rows(named=True)
    ]


def _best_cells(best: pl.DataFrame) -> list[list[str]]:
    return [
        [
            row["task"],
            row["schedule"],
            f"{row['learning_rate']:g}",
            f"{row['loss_100']:.3g}",
            f"{row['test_metric']:.1f}",
            f"{row['worst']:.1f}",
        ]
        for row in best.iter_rows(named=True)
    ]


def _recovery_cells(table: pl.DataFrame) -> list[list[str]]:
    return [
        [
            row["task"],
            row["schedule"],
            f"{row['recovery']:g}",
            f"{row['recovered']:.0f}",
            f"{row['damage']:.2f}",
            f"{row['metric']:.1f}",
            f"{row['points_below']:+.1f}",
        ]
        for row in table.iter_rows(named=True)
    ]


def _claim_cells(claims: pl.DataFrame) -> list[list[str]]:
    return [
        [
            row["schedule"],
            row["rate"],
            str(row["experiments"]),
            str(row["lower"]),
            str(row["higher"]),
            interval_text(row, ".2f", "ratio"),
            f"{row['metric']:+.1f}"
            if math.isnan(row["metric_low"])
            else interval_text(row, "+.1f", "metric"),
            f"{row['narrower']:.0f}",
        ]
        for row in claims.sort("schedule", maintain_order=True).iter_rows(named=True)
    ]


def _middle(runs: pl.DataFrame, task: str) -> pl.DataFrame:
    """The runs of a task from the middle of its initial rates."""
    own = runs.filter(task=task)
    rates = sorted(set(own["learning_rate"]))
    return own.filter(learning_rate=rates[len(rates) // 2])


def _smoothed(cell: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and losses smoothed over 5% of the steps, shape (runs, steps)."""
    losses = np.array(cell["loss"].to_list(), float)
    width = max(1, losses.shape[1] // 20)
    smooth = np.array([drawing.smooth(loss, width) for loss in losses])
    return np.arange(smooth.shape[1]) + width, smooth


def _panels(runs: pl.DataFrame) -> tuple[plt.Figure, list[tuple[plt.Axes, str]]]:
    tasks = runs["task"].unique(maintain_order=True).to_list()
    width = 4.0 if len(tasks) > 1 else 6.5  # inches; room for the title
    figure, panels = drawing.panels(len(tasks), 4, width=width, height=3.0)
    return figure, list(zip(panels, tasks, strict=True))


def _logarithmic(axes: plt.Axes) -> None:
    """A logarithmic vertical axis with plain numbers at 1, 2 and 5 times powers of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_histories(runs: pl.DataFrame) -> plt.Figure:
    """The training loss of each task from the middle rate: median and band over seeds."""
    undisturbed, _ = split(runs)
    figure, panels = _panels(undisturbed)
    for axes, task in panels:
        for (schedule,), cell in _middle(undisturbed, task).group_by(["schedule"], maintain_order=True):
            steps, losses = _smoothed(cell)
            axes.plot(steps, np.median(losses, axis=0), label=schedule, **line_style(schedule))
            color = REGISTRY[schedule].look.color
            axes.fill_between(steps, losses.min(axis=0), losses.max(axis=0), color=color, alpha=0.12, lw=0)
        axes.set_title(task, fontsize=9)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        _logarithmic(axes)
    drawing.add_legend(figure, panels[0][0], columns=len(SCHEDULES) if len(panels) > 1 else 3)
    figure.suptitle("From the middle initial rate: median, minimum to maximum", fontsize=12)
    return figure


def draw_rates(table: pl.DataFrame) -> plt.Figure:
    """The held-out metric against the initial rate."""
    figure, panels = _panels(table)
    for axes, task in panels:
        for schedule in SCHEDULES:
            own = table.filter(task=task, schedule=schedule).sort("learning_rate")
            style = {**line_style(schedule), "markevery": 1}
            axes.plot(own["learning_rate"], own["test_metric"], label=schedule, **style)
        axes.set_title(task, fontsize=9)
        axes.set_xscale("log")
        axes.set_xlabel("initial rate")
        axes.set_ylabel("held-out metric, %")
    drawing.add_legend(figure, panels[0][0], columns=len(SCHEDULES) if len(panels) > 1 else 3)
    figure.suptitle("Held-out metric after fine-tuning: median over seeds", fontsize=12)
    return figure


def draw_recovery(runs: pl.DataFrame) -> plt.Figure:
    """The training loss of the runs with wrong labels."""
    _, disturbed = split(runs)
    figure, panels = _panels(disturbed)
    for axes, task in panels:
        for (schedule,), cell in disturbed.filter(task=task).group_by(["schedule"], maintain_order=True):
            losses = np.array(cell["loss"].to_list(), float)
            axes.plot(np.median(losses, axis=0), label=schedule, **line_style(schedule))
        axes.axvspan(_start(task), _start(task) + WRONG_BATCHES, color=drawing.GREY, alpha=0.3, lw=0)
        axes.set_title(task.partition("+")[0], fontsize=9)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
        _logarithmic(axes)
    drawing.add_legend(figure, panels[0][0], columns=len(SCHEDULES) if len(panels) > 1 else 3)
    figure.suptitle("Wrong labels in the grey steps; median over seeds", fontsize=12)
    return figure


def _sections(
    runs: pl.DataFrame, table: pl.DataFrame, claims: pl.DataFrame, recoveries: pl.DataFrame
) -> list[html.Section]:
    sections = [
        html.Section("GreedyLR against each schedule", "", [html.Table(_CLAIMS, _claim_cells(claims))]),
        html.Section(
            "Best initial rate of each schedule",
            "Of three rates, that with the lowest final training loss.",
            [html.Table(_BEST, _best_cells(best_rates(table)))],
        ),
    ]
    undisturbed, disturbed = split(runs)
    if len(disturbed):
        parts: list[Any] = [html.Table(_RECOVERY, _recovery_cells(recoveries))]
        parts += [
            _loss_figure(disturbed.filter(task=task), task)
            for task in disturbed["task"].unique(maintain_order=True)
        ]
        sections.append(html.Section("Five batches with wrong labels", "Medians over seeds.", parts))
    for task in undisturbed["task"].unique(maintain_order=True):
        own = _middle(undisturbed, task)
        curves = [
            html.Curve(
                schedule,
                np.arange(len(cell["rate"][0])),
                np.median(np.array(cell["rate"].to_list(), float), axis=0),
                REGISTRY[schedule].look.plotly(),
            )
            for (schedule,), cell in own.group_by(["schedule"], maintain_order=True)
        ]
        parts = [
            html.Table(_HEADERS, _cells(table.filter(task=task))),
            _loss_figure(own, task),
            html.line_figure(curves, "step", "learning rate", y_log=True),
        ]
        sections.append(html.Section(task, "Figures: from the middle rate, medians over seeds.", parts))
    return sections


def _loss_figure(cell: pl.DataFrame, task: str) -> Any:
    curves = []
    for (schedule,), own in cell.group_by(["schedule"], maintain_order=True):
        steps, losses = _smoothed(own)
        curves.append(
            html.Curve(schedule, steps, np.median(losses, axis=0), REGISTRY[schedule].look.plotly())
        )
    return html.line_figure(curves, f"step ({task})", "training loss, smoothed", y_log=True)
