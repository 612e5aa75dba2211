"""Tables 1 to 4 of "LRTuner: A Learning Rate Tuner for Deep Neural Networks" on small tasks: LRTuner against
hand-tuned schedules, and the steps that it saves.

The paper trains ResNets on ImageNet and CIFAR-10 with momentum and a step schedule, fine-tunes BERT on SQuAD
with AdamW and a linear one, and trains a transformer on IWSLT with Adam, warmup and an inverse square root.
This study has the same pairs on its own tasks. As in the paper, LRTuner starts from the baseline's initial
rate, which is the best of a grid on seeds that are not reported.
"""

from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import polars as pl

from experiments.reporting import drawing, html
from experiments.reporting.summary import confidence_interval, interval_text, stage_losses
from experiments.reporting.tables import print_table
from experiments.studies.base import Job, Sweep, publish
from experiments.studies.tuning import TUNING_SEEDS, best_rates, reported
from experiments.training.engine import Settings, make_specs
from experiments.training.sweep import Group

RULE = "LRTuner"
EVALUATIONS = 20


class Case(NamedTuple):
    """A table of the paper and its counterpart in this study."""

    table: str
    paper: str  # what the paper reports
    task: str
    optimizer: str
    schedule: str
    rates: tuple[float, ...]  # grid of the baseline


CASES = (
    Case(
        "1",
        "ImageNet, ResNet-50, momentum: top-1 76.06 against 75.87%, baseline reached in 29% fewer steps",
        "digits-resnet",
        "momentum",
        "step",
        (0.01, 0.03, 0.1, 0.3),
    ),
    Case(
        "2",
        "CIFAR-10, ResNet-18, momentum: 94.79 against 94.81%",
        "digits",
        "momentum",
        "step",
        (0.01, 0.03, 0.1, 0.3),
    ),
    Case(
        "3",
        "SQuAD, BERT, AdamW: exact match 81.2 against 80.7%, baseline reached in 20% fewer steps",
        "question-answering",
        "adamw",
        "linear",
        (1e-3, 3e-3, 1e-2),
    ),
    Case(
        "4",
        "IWSLT, transformer, Adam: BLEU 34.88 against 34.70, baseline reached in 24% fewer steps",
        "translation-fr",
        "adamw",
        "inverse-sqrt",
        (1e-3, 3e-3, 1e-2),
    ),
)
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"steps": 400, "seeds": 3},
    "full": {"steps": 2000, "seeds": 7},
}


def run(job: Job) -> None:
    """Trains all runs and writes rows, table, figure and report; resumes an interrupted job."""
    chosen = PRESETS[job.preset]
    sweep = Sweep(job, Settings(chosen["steps"], EVALUATIONS), {"preset": chosen, "cases": CASES})
    tuning = [
        Group(case.task, case.optimizer, make_specs((case.schedule,), case.rates, TUNING_SEEDS))
        for case in CASES
    ]
    best = best_rates(sweep.train(tuning, keep_programs=True))
    groups = [
        Group(
            case.task,
            case.optimizer,
            make_specs(
                (case.schedule, RULE),
                (best[case.task, case.optimizer],),
                range(chosen["seeds"]),
                label=f"Table {case.table}",
            ),
        )
        for case in CASES
    ]
    sweep.train(groups, keep_programs=True)
    runs = sweep.finish()
    table = summarize(runs)
    print_table(job.console, "LRTuner against hand-tuned schedules", _HEADERS, _cells(table), left=4)
    publish(
        job,
        "LRTuner against hand-tuned schedules",
        f"{chosen['steps']} steps, {chosen['seeds']} seeds, mean (standard deviation). Steps saved: steps "
        "before the end, in percent of all steps, at which LRTuner's held-out metric (mean over seeds, "
        "evaluated every 5% of the steps) permanently reaches the baseline's final one; none if it does not.",
        tables={"table": table},
        figures={"histories": draw(runs)},
        sections=_sections(runs, table),
        recomputed_by="experiments.studies.lrtuner.summarize",
    )


def summarize(runs: pl.DataFrame) -> pl.DataFrame:
    """One row for each case and schedule.

    Returns:
      A frame with ``table``, ``task``, ``optimizer``, ``schedule``, ``learning_rate``; means and standard
      deviations of the final training loss (``loss``, ``loss_deviation``) and of the held-out metric in
      percent (``metric``, ``metric_deviation``); ``difference`` of the metric from the baseline's, paired by
      seed, with its 95% confidence interval; ``saved``: percent of the steps saved to reach the baseline's
      metric, or None.
    """
    rows = []
    for case in CASES:
        cell = reported(runs).filter(pl.col("label") == f"Table {case.table}")
        baseline = cell.filter(pl.col("schedule") == case.schedule).sort("seed")
        for schedule in (case.schedule, RULE):
            own = cell.filter(pl.col("schedule") == schedule).sort("seed")
            losses = np.array([stage_losses(np.array(loss, float))[100] for loss in own["loss"].to_list()])
            differences = 100 * (own["test_metric"] - baseline["test_metric"]).to_numpy()
            low, high = confidence_interval(differences)
            rows.append(
                {
                    "table": case.table,
                    "task": case.task,
                    "optimizer": case.optimizer,
                    "schedule": schedule,
                    "learning_rate": own["learning_rate"][0],
                    "loss": float(losses.mean()),
                    "loss_deviation": float(losses.std(ddof=1)),
                    "metric": 100 * float(own["test_metric"].mean()),
                    "metric_deviation": 100 * float(own["test_metric"].std()),
                    "difference": float(differences.mean()),
                    "difference_low": low,
                    "difference_high": high,
                    "saved": None if schedule == case.schedule else saved(own, baseline),
                }
            )
    return pl.DataFrame(rows, infer_schema_length=None)


def saved(own: pl.DataFrame, baseline: pl.DataFrame) -> float | None:
    """Percent of the steps saved to reach the baseline's final metric permanently, for means over seeds.

    Permanently: the metric stays at or above it until the end. None if it ends below it.
    """
    target = baseline["test_metric"].mean()
    history = np.array(own["test_metrics"].to_list()).mean(axis=0)
    below = np.flatnonzero(history < target)
    needed = below[-1] + 2 if len(below) else 1
    return 100 * (1 - needed / len(history)) if needed <= len(history) else None


_HEADERS = (
    "table",
    "task",
    "optimizer",
    "schedule",
    "rate",
    "training loss",
    "held-out metric, %",
    "difference [95% CI]",
    "steps saved",
)


def _cells(table: pl.DataFrame) -> list[list[str]]:
    cells = []
    for row in table.iter_rows(named=True):
        is_rule = row["schedule"] == RULE
        steps = "none" if row["saved"] is None else f"{row['saved']:.0f}%"
        cells.append(
            [
                row["table"],
                row["task"],
                row["optimizer"],
                row["schedule"],
                f"{row['learning_rate']:g}",
                f"{row['loss']:.3g} ({row['loss_deviation']:.1g})",
                f"{row['metric']:.2f} ({row['metric_deviation']:.2f})",
                interval_text(row, "+.2f") if is_rule else "",
                steps if is_rule else "",
            ]
        )
    return cells


def _means(runs: pl.DataFrame, case: Case, schedule: str, column: str) -> np.ndarray:
    cell = reported(runs).filter(label=f"Table {case.table}", schedule=schedule)
    return np.array(cell[column].to_list(), float).mean(axis=0)


def draw(runs: pl.DataFrame) -> plt.Figure:
    """Loss, held-out metric and rate of each case, as in the paper's figures 5 to 8."""
    figure, panels = drawing.panels(3 * len(CASES), len(CASES), width=4.0, height=2.8)
    for column, case in enumerate(CASES):
        for row, (name, title) in enumerate(
            (("loss", "training loss"), ("test_metrics", "held-out metric"), ("rate", "learning rate"))
        ):
            axes = panels[row * len(CASES) + column]
            for schedule, color in ((case.schedule, drawing.ORANGE), (RULE, drawing.BLUE)):
                values = _means(runs, case, schedule, name)
                steps = drawing.percent_of_steps(len(values))
                if name == "loss":
                    width = max(1, len(values) // 20)
                    values, steps = drawing.smooth(values, width), steps[width - 1 :]
                axes.plot(steps, values, color=color, lw=1.5, label=RULE if schedule == RULE else "baseline")
            axes.set_ylabel(title)
            axes.set_xlabel("steps, %")
            if name != "test_metrics":
                axes.set_yscale("log")
            if row == 0:
                axes.set_title(
                    f"Table {case.table}: {case.task},\n{case.optimizer}, {case.schedule}", fontsize=9
                )
    drawing.add_legend(figure, panels[0])
    figure.suptitle("Means over seeds", fontsize=12)
    return figure


def _sections(runs: pl.DataFrame, table: pl.DataFrame) -> list[html.Section]:
    sections = []
    for case in CASES:
        parts: list[Any] = [html.Table(_HEADERS, _cells(table.filter(pl.col("table") == case.table)))]
        for name, title, log in (
            ("loss", "training loss, smoothed", True),
            ("test_metrics", "held-out metric", False),
            ("rate", "learning rate", True),
        ):
            curves = []
            for schedule, color in ((case.schedule, drawing.ORANGE), (RULE, drawing.BLUE)):
                values = _means(runs, case, schedule, name)
                if name == "loss":
                    values = drawing.smooth(values, max(1, len(values) // 20))
                steps = drawing.percent_of_steps(len(values))
                curves.append(html.Curve(schedule, steps, values, drawing.Look(color).plotly()))
            parts.append(html.line_figure(curves, "steps, %", title, y_log=log))
        sections.append(html.Section(f"Table {case.table}: {case.task}", f"Paper: {case.paper}.", parts))
    return sections
