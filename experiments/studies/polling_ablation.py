"""The settings that "Automated learning rate scheduling with in-training information" leaves open: how often
factor polling polls, how sharp its score is, how the losses are normalized, and by which function they are
scored. The defaults of :func:`greedylr_jax.factor_polling` are chosen by this study.

Every cadence, sharpness and normalization with the exponential score, and every cadence and sharpness with
the other scores; from a good initial rate, and from one that is 200 times too large. The tasks in
:data:`REDUCED` are trained with the exponential score and the minmax normalization only.
"""

import itertools
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import polars as pl

from experiments.errors import UsageError
from experiments.reporting import drawing, html
from experiments.reporting.tables import print_table
from experiments.studies.base import Job, Sweep, publish
from experiments.tasks import make_task
from experiments.training.engine import RunSpec, Settings
from experiments.training.schedules import parse
from experiments.training.sweep import Group

OPTIMIZER = "sgd"
VARIANT = "polling-5"
SHARPNESS = (1.0, 5.0, 20.0)
EPOCH = 0  # stands for the number of steps of an epoch
CADENCES = (1, 5, EPOCH)
NORMALIZATIONS = ("minmax", "standard", "none")
SCORES = ("exponential", "inverse", "linear")
TOO_LARGE = 200.0
GOOD, LARGE = "good", f"{TOO_LARGE:g} x good"  # labels of the runs: their initial rate
REDUCED = ("digits-resnet",)  # tasks with slow steps
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"tasks": {"digits-mlp": 0.3, "digits": 0.5, "digits-resnet": 0.1}, "steps": 220, "seeds": 8},
    "full": {"tasks": {"digits-mlp": 0.3, "digits": 0.5, "digits-resnet": 0.1}, "steps": 2200, "seeds": 5},
}


def variants(*, reduced: bool = False) -> list[dict[str, Any]]:
    """The settings of each variant; a cadence of :data:`EPOCH` is once per epoch."""
    pairs = [("minmax", "exponential")]
    if not reduced:
        pairs += [(normalize, "exponential") for normalize in NORMALIZATIONS[1:]]
        pairs += [("minmax", score) for score in SCORES[1:]]
    return [
        {"every": every, "sharpness": sharpness, "normalize": normalize, "score": score}
        for (normalize, score), every, sharpness in itertools.product(pairs, CADENCES, SHARPNESS)
    ]


def run(job: Job) -> None:
    """Trains all runs and writes rows, table, figure and report; resumes an interrupted job."""
    chosen = PRESETS[job.preset]
    if job.one_optimizer(OPTIMIZER) != OPTIMIZER:
        raise UsageError(f"study {job.name} knows good rates of {OPTIMIZER} only: leave out --optimizer")
    tasks = job.tasks(tuple(chosen["tasks"]), chosen["tasks"])
    sweep = Sweep(job, Settings(chosen["steps"]), {"preset": chosen, "variants": variants()})
    groups = []
    for name in tasks:
        rate = chosen["tasks"][name]
        per_epoch = make_task(name).steps_per_epoch
        schedules = ["constant", *(_schedule(each, per_epoch) for each in variants(reduced=name in REDUCED))]
        specs = [
            RunSpec(schedule, factor * rate, seed, label=label)
            for schedule in schedules
            for factor, label in ((1.0, GOOD), (TOO_LARGE, LARGE))
            for seed in range(chosen["seeds"])
        ]
        groups.append(Group(name, OPTIMIZER, specs))
    sweep.train(groups)
    runs = sweep.finish()
    table = summarize(runs)
    print_table(job.console, "Settings of factor polling", _HEADERS, _cells(table), left=4)
    publish(
        job,
        "Settings of factor polling",
        f"{VARIANT}, {chosen['steps']} steps, {chosen['seeds']} seeds, {OPTIMIZER}, held-out accuracy in "
        "percent. Mean and lowest: over the seeds of all tasks but those trained with one normalization and "
        f"score ({', '.join(REDUCED)}). Initial rates: "
        f"{ {task: chosen['tasks'][task] for task in tasks} } and {TOO_LARGE:g} times as much.",
        tables={"table": table},
        figures={"cadence": draw(table)},
        sections=[html.Section("All variants", "", [html.Table(_HEADERS, _cells(table))])],
        recomputed_by="experiments.studies.polling_ablation.summarize",
    )


def _schedule(variant: dict[str, Any], per_epoch: int) -> str:
    settings = variant | {"every": variant["every"] or per_epoch}
    return f"{VARIANT}({', '.join(f'{key}={value!r}' for key, value in settings.items())})"


def summarize(runs: pl.DataFrame) -> pl.DataFrame:
    """One row for each variant and initial rate, the best first.

    Returns:
      A frame with ``label`` (:data:`GOOD` or :data:`LARGE`), ``score``, ``normalize``, ``every`` (0: once per
      epoch), ``sharpness`` (None in the row of the constant rate), ``accuracy``: the mean held-out accuracy
      in percent over the seeds of all tasks but :data:`REDUCED`, and ``worst``, the lowest; and a column for
      each task with the mean over its seeds.
    """
    tasks = runs["task"].unique(maintain_order=True).to_list()
    per_epoch = {name: make_task(name).steps_per_epoch for name in tasks}
    described = [
        _describe(schedule, per_epoch[task]) for task, schedule in runs.select("task", "schedule").iter_rows()
    ]
    keys = ("score", "normalize", "every", "sharpness")
    frame = pl.concat([runs, pl.DataFrame(described, infer_schema_length=None)], how="horizontal")
    accuracy = 100 * pl.col("test_metric")
    compared = accuracy.filter(~pl.col("task").is_in(REDUCED))
    columns = {task: accuracy.filter(pl.col("task") == task).mean() for task in tasks}
    table = frame.group_by("label", *keys, maintain_order=True).agg(
        accuracy=compared.mean(), worst=compared.min(), **columns
    )
    return table.sort("label", "accuracy", descending=[True, True], maintain_order=True)


def _describe(schedule: str, per_epoch: int) -> dict[str, Any]:
    entry, settings = parse(schedule)
    if not settings:
        return {"score": entry.name, "normalize": "", "every": None, "sharpness": None}
    every = EPOCH if settings["every"] == per_epoch else settings["every"]
    return {
        "score": settings["score"],
        "normalize": settings["normalize"],
        "every": every,
        "sharpness": settings["sharpness"],
    }


_HEADERS = (
    "initial rate",
    "score",
    "normalization",
    "polls",
    "sharpness",
    "mean accuracy, %",
    "worst, %",
    "tasks",
)


def _cells(table: pl.DataFrame) -> list[list[str]]:
    tasks = table.columns[7:]
    return [
        [
            row["label"],
            row["score"],
            row["normalize"],
            ""
            if row["every"] is None
            else "once per epoch"
            if row["every"] == EPOCH
            else f"every {row['every']}",
            "" if row["sharpness"] is None else f"{row['sharpness']:g}",
            f"{row['accuracy']:.1f}",
            f"{row['worst']:.1f}",
            ", ".join(f"{task} {row[task]:.1f}" for task in tasks if row[task] is not None),
        ]
        for row in table.iter_rows(named=True)
    ]


def draw(table: pl.DataFrame) -> plt.Figure:
    """Mean accuracy against the sharpness: a line for each cadence, a panel for each way of scoring."""
    variants = table.filter(pl.col("sharpness").is_not_null())
    kinds = (
        variants.select("score", "normalize").unique(maintain_order=True).sort("score", "normalize").rows()
    )
    labels = table["label"].unique(maintain_order=True).to_list()
    figure, panels = drawing.panels(len(labels) * len(kinds), len(kinds), width=3.2, height=2.8, sharey=True)
    colors = (drawing.BLUE, drawing.GREEN, drawing.ORANGE)
    for axes, (label, (score, normalize)) in zip(panels, itertools.product(labels, kinds), strict=True):
        own = variants.filter(label=label, score=score, normalize=normalize)
        for color, every in zip(colors, CADENCES, strict=True):
            line = own.filter(every=every).sort("sharpness")
            name = "once per epoch" if every == EPOCH else f"every {every} steps"
            axes.plot(line["sharpness"], line["accuracy"], color=color, marker="o", ms=3, label=name)
        constant = table.filter(pl.col("sharpness").is_null(), label=label)["accuracy"]
        axes.axhline(float(np.asarray(constant)[0]), color=drawing.GREY, lw=1, label="constant rate")
        axes.set_xscale("log")
        axes.set_title(f"{label}: {score}, {normalize}", fontsize=9)
        axes.set_xlabel("sharpness")
    panels[0].set_ylabel("mean accuracy, %")
    drawing.add_legend(figure, panels[0])
    return figure
