"""The perturbation study of "Dynamic Learning Rate Scheduling based on Loss Changes": schedules under noise
of the observed loss, noise of the gradients, and perturbations of the parameters.

The paper claims a lower median loss than common schedules, tighter percentile bands, and exceptional recovery
from perturbations. The kinds of noise are described in :mod:`experiments.training.disturbance`.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import polars as pl

from experiments.reporting import drawing, html
from experiments.reporting.summary import GREEDYLR, confidence_interval, interval_text, stage_losses
from experiments.reporting.tables import print_table
from experiments.studies.base import Job, Sweep, line_style, publish
from experiments.tasks import make_task
from experiments.training.disturbance import (
    KINDS,
    TARGETS,
    disturbance_inputs,
    name_of,
    parse,
    perturbation_step,
)
from experiments.training.engine import RunSpec, Settings
from experiments.training.schedules import SCHEDULES as REGISTRY
from experiments.training.sweep import Group

SCHEDULES = ("constant", "linear", "cosine", "plateau", GREEDYLR)
STRENGTHS = (0.1, 0.5, 1.0)
OPTIMIZER = "sgd"
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "tasks": (
            "quadratic-10",
            "quadratic-1000",
            "rosenbrock",
            "rastrigin",
            "ackley",
            "digits-mlp",
            "mnist1d-mlp",
        ),
        "steps": 500,
        "seeds": 2,
    },
    # 8,730 runs, for an accelerator; the paper has 8,100.
    "full": {
        "tasks": (
            "digits",
            "digits-resnet",
            "digits-vit",
            "mnist1d-mlp",
            "language-lstm",
            "language-transformer",
        ),
        "steps": 1000,
        "seeds": 3,
    },
}
_FLOOR = 1e-6  # lower bound of final losses, in units of the initial loss
_WINDOW = 10  # steps that losses are averaged over
PERCENTILES = (10, 50, 90)


def disturbances() -> list[str]:
    """The names of all disturbances, "none" first."""
    kinds = [kind for kind in KINDS if kind != "none"]
    return ["none", *(name_of(*each) for each in itertools.product(kinds, STRENGTHS, TARGETS))]


def run(job: Job) -> None:
    """Trains all runs and writes rows, tables, figures and report; resumes an interrupted job."""
    chosen, optimizer = PRESETS[job.preset], job.one_optimizer(OPTIMIZER)
    groups = []
    for task in job.tasks(chosen["tasks"]):
        rate = make_task(task).learning_rates[optimizer][1]
        specs = [
            RunSpec(schedule, rate, seed, disturbance)
            for seed in range(chosen["seeds"])
            for disturbance in disturbances()
            for schedule in SCHEDULES
        ]
        groups.append(Group(task, optimizer, specs))
    described = {"preset": chosen, "schedules": SCHEDULES, "disturbances": disturbances()}
    sweep = Sweep(job, Settings(chosen["steps"], disturbed=True), described)
    sweep.train(groups)
    runs = sweep.finish()

    measured = run_metrics(runs)
    table = summarize(measured)
    for target in ("undisturbed", *TARGETS):
        print_table(job.console, f"Disturbed: {target}", _HEADERS, _cells(table, target))
    comparison = compare(measured)
    against = "GreedyLR against each schedule with the same task, seed and noise"
    print_table(job.console, against, _AGAINST, _rows(comparison), left=2)
    publish(
        job,
        "Robustness to noise",
        f"{len(runs)} runs of {chosen['steps']} steps with {optimizer}. Final loss: the clean training "
        "loss, the mean over the last 5% of steps, relative to that of the undisturbed run with a constant "
        "rate and the same task and seed. Damage: the same, relative to the undisturbed run of the same "
        "schedule; damaged: by more than 1%. Recovery: steps after a parameter perturbation until the loss "
        f"(mean of {_WINDOW} steps) is at or below its value before it; runs that never recover are counted "
        "separately. Percentiles are over noises and seeds within a task; their median over tasks is shown.",
        tables={"table": table, "against": comparison},
        figures={"bands": draw_bands(measured), "recovery": draw_recovery(runs)},
        sections=_sections(runs, measured, table, comparison),
        recomputed_by="experiments.studies.robustness.run_metrics, then summarize and compare",
        schedules=SCHEDULES,
    )


def run_metrics(runs: pl.DataFrame) -> pl.DataFrame:
    """One row per run with its metrics.

    Args:
      runs: the rows of ``runs.parquet``.

    Returns:
      A frame with ``task``, ``schedule``, ``seed``, ``kind``, ``strength``, ``target`` (or "undisturbed");
      ``final``: the final loss relative to the undisturbed constant rate; ``damage``: relative to the
      undisturbed run of the same schedule; ``recovery``: steps after the parameter perturbation until the
      loss has recovered (infinite if it does not; None without a perturbation).
    """
    rows = []
    for row in runs.iter_rows(named=True):
        loss = np.array(row["loss"], float)
        kind, strength, target = parse(row["disturbance"])
        disturbed = row["disturbance"] != "none"
        final = stage_losses(loss)[100]
        rows.append(
            {
                "task": row["task"],
                "schedule": row["schedule"],
                "seed": row["seed"],
                "kind": kind,
                "strength": strength,
                "target": target if disturbed else "undisturbed",
                "absolute": max(final, _FLOOR * abs(loss[0])),
                "recovery": recovery(loss, row["disturbance"], row["seed"])
                if disturbed and target in ("parameters", "all")
                else None,
            }
        )
    frame = pl.DataFrame(rows, infer_schema_length=None)
    clean = frame.filter(pl.col("target") == "undisturbed")
    own = clean.select("task", "schedule", "seed", own="absolute")
    constant = clean.filter(pl.col("schedule") == "constant").select("task", "seed", constant="absolute")
    frame = frame.join(own, on=["task", "schedule", "seed"]).join(constant, on=["task", "seed"])
    return frame.with_columns(
        final=pl.col("absolute") / pl.col("constant"), damage=pl.col("absolute") / pl.col("own")
    ).drop("own", "constant")


def recovery(loss: np.ndarray, disturbance: str, seed: int) -> float:
    """Steps after the parameter perturbation until the loss is at or below its value before it.

    Args:
      loss: the clean loss before each update, shape (steps,).
      disturbance: name of the run's disturbance.
      seed: of the run, which determines the step of the perturbation.

    Returns:
      The number of steps, 0 if the loss did not rise; infinite if it does not recover.
    """
    perturbations = disturbance_inputs(disturbance, len(loss), seed).parameters
    at = perturbation_step(perturbations)
    if perturbations[at] == 0:
        return 0.0
    before = np.mean(loss[at - _WINDOW + 1 : at + 1])
    after = drawing.smooth(loss[at + 1 :], _WINDOW)
    recovered = np.flatnonzero(after <= before)
    return float(recovered[0]) if len(recovered) else float("inf")


def summarize(measured: pl.DataFrame) -> pl.DataFrame:
    """One row for each target and schedule: percentiles of :func:`run_metrics` over noises and seeds within a
    task, and the median of these over tasks.

    Returns:
      A frame with ``target``, ``schedule``, ``runs``, ``final_10``, ``final_50``, ``final_90``,
      ``damage_50``, ``damage_90``, ``damaged`` (percent of the runs whose final loss is more than 1% above
      that of the undisturbed run), ``recovery_50`` (median of the runs that recover) and ``not_recovered``
      (percent of the runs).
    """
    rows = []
    for (target, schedule), cell in measured.group_by(["target", "schedule"], maintain_order=True):
        perturbed = cell["recovery"].drop_nulls().to_numpy()
        recovered = perturbed[np.isfinite(perturbed)]
        rows.append(
            {
                "target": target,
                "schedule": schedule,
                "runs": len(cell),
                **{f"final_{p}": _percentile(cell, "final", p) for p in PERCENTILES},
                **{f"damage_{p}": _percentile(cell, "damage", p) for p in (50, 90)},
                "damaged": 100 * float(np.mean(~(cell["damage"].to_numpy() <= 1.01))),
                "recovery_50": float(np.median(recovered)) if len(recovered) else None,
                "not_recovered": 100 * float(np.mean(np.isinf(perturbed))) if len(perturbed) else None,
            }
        )
    return pl.DataFrame(rows, infer_schema_length=None)


def _percentile(cell: pl.DataFrame, column: str, percentile: float) -> float:
    """The percentile over noises and seeds within each task, and the median of these over tasks.

    Tasks differ by orders of magnitude, so percentiles over all runs would be those of a single task. Values
    may be infinite, so percentiles are not interpolated.
    """
    within = [
        np.percentile(own[column].to_numpy(), percentile, method="nearest")
        for _, own in cell.group_by(["task"], maintain_order=True)
    ]
    return float(np.percentile(within, 50, method="nearest"))


def compare(measured: pl.DataFrame) -> pl.DataFrame:
    """GreedyLR against each schedule, paired by task, seed and disturbance.

    Returns:
      A frame with ``target``, ``schedule``, ``lower``: percent of pairs in which GreedyLR's final loss is
      lower by more than 1%; ``higher``: in which it is higher by more than 1%; ``ratio``: the geometric mean
      of GreedyLR's loss over the schedule's, with ``ratio_low`` and ``ratio_high``, its 95% confidence
      interval over the means of the tasks.
    """
    keys = ["task", "seed", "kind", "strength", "target"]
    greedy = measured.filter(pl.col("schedule") == GREEDYLR).select(*keys, greedy="absolute")
    rows = []
    for target in ("undisturbed", *TARGETS):
        for schedule in (name for name in SCHEDULES if name != GREEDYLR):
            own = measured.filter(schedule=schedule, target=target)
            pairs = own.join(greedy, on=keys).with_columns(
                log=(pl.col("greedy").clip(0, 1e9) / pl.col("absolute").clip(0, 1e9)).log()
            )
            means = pairs.group_by("task", maintain_order=True).agg(pl.col("log").mean())["log"].to_numpy()
            low, high = confidence_interval(means)
            ratio = pairs["greedy"] / pairs["absolute"]
            rows.append(
                {
                    "target": target,
                    "schedule": schedule,
                    "lower": 100 * float((ratio < 0.99).mean()),
                    "higher": 100 * float((ratio > 1.01).mean()),
                    "ratio": float(np.exp(means.mean())),
                    "ratio_low": float(np.exp(low)),
                    "ratio_high": float(np.exp(high)),
                }
            )
    return pl.DataFrame(rows)


_HEADERS = (
    "schedule",
    "runs",
    *(f"final loss, {p}%" for p in PERCENTILES),
    "damage, 50%",
    "damage, 90%",
    "damaged, %",
    "recovery, steps",
    "not recovered, %",
)
_AGAINST = ("disturbed", "against", "lower, %", "higher, %", "ratio of losses [95% CI]")


def _cells(table: pl.DataFrame, target: str) -> list[list[str]]:
    cells = []
    for row in table.filter(pl.col("target") == target).iter_rows(named=True):
        finals = (f"{row[f'final_{p}']:.3g}" for p in PERCENTILES)
        recovery_cells = (
            ["", ""]
            if row["not_recovered"] is None
            else [f"{row['recovery_50']:g}", f"{row['not_recovered']:.1f}"]
        )
        cells.append(
            [
                row["schedule"],
                str(row["runs"]),
                *finals,
                f"{row['damage_50']:.3g}",
                f"{row['damage_90']:.3g}",
                f"{row['damaged']:.0f}",
                *recovery_cells,
            ]
        )
    return cells


def _rows(comparison: pl.DataFrame) -> list[list[str]]:
    return [
        [
            row["target"],
            row["schedule"],
            f"{row['lower']:.0f}",
            f"{row['higher']:.0f}",
            interval_text(row, ".2f", "ratio"),
        ]
        for row in comparison.iter_rows(named=True)
    ]


def _by_strength(measured: pl.DataFrame, target: str, schedule: str) -> list[list[float]]:
    """For each percentile the final losses at each strength, starting with 0."""
    own = measured.filter(pl.col("schedule") == schedule)
    cells = [own.filter(pl.col("target") == "undisturbed")] + [
        own.filter((pl.col("target") == target) & (pl.col("strength") == strength)) for strength in STRENGTHS
    ]
    return [[_percentile(cell, "final", p) for cell in cells] for p in PERCENTILES]


def draw_bands(measured: pl.DataFrame) -> plt.Figure:
    """Final loss against the strength of the noise: median and band from the 10th to the 90th percentile."""
    figure, panels = drawing.panels(len(TARGETS), 2, width=5.2, height=3.8)
    strengths = (0.0, *STRENGTHS)
    for axes, target in zip(panels, TARGETS, strict=True):
        for schedule in SCHEDULES:
            low, median, high = (np.minimum(each, 1e6) for each in _by_strength(measured, target, schedule))
            look = REGISTRY[schedule].look
            axes.plot(strengths, median, **line_style(schedule), label=schedule)
            axes.fill_between(strengths, low, high, color=look.color, alpha=0.12, lw=0)
        axes.set_yscale("log")
        axes.set_title(f"disturbed: {target}", fontsize=10)
        axes.set_xlabel("strength")
        axes.set_ylabel("final loss / undisturbed constant")
    drawing.add_legend(figure, panels[0], columns=len(SCHEDULES))
    figure.suptitle("Median over noises and seeds; band: 10% to 90%; the median task", fontsize=12)
    return figure


def _after_perturbation(runs: pl.DataFrame, task: str, schedule: str) -> np.ndarray:
    """Smoothed loss after perturbations of strength 1, relative to the loss before; shape (runs, steps)."""
    histories = []
    for row in runs.filter(task=task, schedule=schedule).iter_rows(named=True):
        _, strength, target = parse(row["disturbance"])
        if (strength, target) != (STRENGTHS[-1], "parameters"):
            continue
        loss = np.array(row["loss"], float)
        at = perturbation_step(disturbance_inputs(row["disturbance"], len(loss), row["seed"]).parameters)
        span = len(loss) // 4
        smooth = drawing.smooth(loss[at - _WINDOW + 1 : at + span], _WINDOW)
        relative = smooth / max(smooth[0], _FLOOR * abs(loss[0]))
        histories.append(np.where(np.isfinite(relative), relative, np.inf))
    return np.array(histories)


def draw_recovery(runs: pl.DataFrame) -> plt.Figure:
    """The loss after a parameter perturbation, relative to the loss before it."""
    tasks = runs["task"].unique(maintain_order=True).to_list()
    figure, panels = drawing.panels(len(tasks), 3, width=4.4, height=3.2)
    for axes, task in zip(panels, tasks, strict=True):
        for schedule in SCHEDULES:
            histories = _after_perturbation(runs, task, schedule)
            axes.plot(np.median(histories, axis=0), **line_style(schedule), label=schedule)
        axes.axhline(1, color=drawing.GREY, lw=0.8)
        axes.set_yscale("log")
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("steps after the perturbation")
        axes.set_ylabel("loss / loss before")
    drawing.add_legend(figure, panels[0], columns=len(SCHEDULES))
    figure.suptitle(
        "Recovery from parameter perturbations of strength 1: median over noises and seeds; a line ends "
        "where half of the runs have diverged",
        fontsize=12,
    )
    return figure


def _sections(
    runs: pl.DataFrame, measured: pl.DataFrame, table: pl.DataFrame, comparison: pl.DataFrame
) -> Sequence[html.Section]:
    undisturbed = html.Table(_HEADERS, _cells(table, "undisturbed"))
    sections = [
        html.Section("GreedyLR against each schedule", "", [html.Table(_AGAINST, _rows(comparison))]),
        html.Section("Undisturbed", "", [undisturbed]),
    ]
    dashes = ("dot", "solid", "dot")
    for target in TARGETS:
        curves = [
            html.Curve(
                f"{schedule}, {p}%",
                (0.0, *STRENGTHS),
                values,
                REGISTRY[schedule].look.plotly()
                | {"line": {"color": REGISTRY[schedule].look.color, "dash": dash}},
            )
            for schedule in SCHEDULES
            for p, values, dash in zip(
                PERCENTILES, _by_strength(measured, target, schedule), dashes, strict=True
            )
        ]
        figure = html.line_figure(curves, "strength", "final loss / undisturbed constant", y_log=True)
        parts = [html.Table(_HEADERS, _cells(table, target)), figure]
        sections.append(html.Section(f"Disturbed: {target}", "", parts))
    for task in runs["task"].unique(maintain_order=True):
        curves = [
            html.Curve(schedule, np.arange(len(median)), median, REGISTRY[schedule].look.plotly())
            for schedule in SCHEDULES
            for median in [np.median(_after_perturbation(runs, task, schedule), axis=0)]
        ]
        figure = html.line_figure(curves, "steps after the perturbation", "loss / loss before", y_log=True)
        sections.append(
            html.Section(
                f"Recovery: {task}", "Parameter perturbations of strength 1; median over noises.", [figure]
            )
        )
    return sections
