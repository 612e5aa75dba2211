"""All rules and strong baselines from Optax on all tasks, each with its default settings and nothing tuned.

As in AlgoPerf (G. Dahl et al., "Benchmarking Neural Network Training Algorithms", 2023), every task has a
target, each submission is timed until it reaches the target, and submissions are compared by performance
profiles: for each factor tau, the fraction of tasks on which a submission takes at most tau times as long as
the fastest submission. The score is the area under the profile from 1 to 4. The target is the held-out loss
of AdamW with a cosine schedule after three quarters of the steps, with the best learning rate of a grid on
seeds that are not reported.
"""

from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import polars as pl

from experiments.reporting import drawing, html
from experiments.reporting.palette import Look
from experiments.reporting.tables import print_table
from experiments.studies.base import Job, Sweep, publish
from experiments.studies.tuning import TUNING_SEEDS, reported
from experiments.tasks.base import LEARNING_RATES
from experiments.training.engine import RunSpec, Settings, make_specs
from experiments.training.schedules import SCHEDULES, parse
from experiments.training.sweep import Group


class Submission(NamedTuple):
    """An optimizer with a schedule or rule and its default initial learning rate."""

    name: str
    optimizer: str
    schedule: str
    learning_rate: float


# 0.001 is the default of Adam in its paper, PyTorch and Keras; the baselines have their own defaults.
SUBMISSIONS = (
    Submission("AdamW, constant", "adamw", "constant", 1e-3),
    Submission("AdamW, cosine", "adamw", "cosine", 1e-3),
    Submission("AdamW, plateau", "adamw", "plateau", 1e-3),
    Submission("AdamW, GreedyLR", "adamw", "GreedyLR", 1e-3),
    Submission("AdamW, trend_lr", "adamw", "trend(max_scale=5.0)", 1e-3),
    Submission("AdamW, hypergradient", "adamw", "hypergradient", 1e-3),
    Submission("AdamW, LRTuner", "adamw", "LRTuner", 1e-3),
    Submission("AdamW, polling", "adamw", "polling", 1e-3),
    Submission("AdamW, ARC", "adamw", "ARC", 1e-3),
    Submission("AdamW, auto_lr", "adamw", "auto", 1.0),
    Submission("schedule-free AdamW", "adamw", "schedule-free", 2.5e-3),
    Submission("Prodigy", "adamw", "prodigy", 1.0),
    Submission("Prodigy, cosine", "adamw", "prodigy-cosine", 1.0),
    Submission("Mechanic, AdamW", "adamw", "mechanic", 1.0),
    Submission("MoMo-Adam", "adamw", "momo", 1e-2),
    Submission("SGD, Armijo", "sgd", "Armijo", 1.0),
)


def submissions(optimizer: str | None) -> tuple[Submission, ...]:
    """The submissions, with another optimizer instead of AdamW and the middle one of its common rates.

    Baselines that are optimizers themselves, such as Prodigy, remain as they are.
    """
    if optimizer is None:
        return SUBMISSIONS
    rate = LEARNING_RATES[optimizer][1]
    return tuple(
        Submission(each.name.replace("AdamW", optimizer), optimizer, each.schedule, rate)
        if each.name.startswith("AdamW, ")
        else each
        for each in SUBMISSIONS
    )


GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # of the cosine schedule that defines the targets
EVALUATIONS = 20
_TARGET_AT = 3 * EVALUATIONS // 4 - 1
MAX_FACTOR = 4.0  # as in AlgoPerf
_FUNCTIONS = ("quadratic-10", "quadratic-1000", "rosenbrock", "rastrigin", "ackley")
_SMALL = ("digits-mlp", "mnist1d-mlp", "digits", "digits-vit", "tagging", "translation-fr")
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"tasks": (*_FUNCTIONS, *_SMALL), "steps": 300, "seeds": 3},
    "full": {
        "tasks": (
            *_FUNCTIONS,
            *_SMALL,
            "digits-resnet",
            "segmentation",
            "detection",
            "language-lstm",
            "language-transformer",
            "translation-de",
            "translation-es",
            "summarization",
            "question-answering",
        ),
        "steps": 2000,
        "seeds": 5,
    },
}
COSTS = {"steps": "steps to the target", "seconds": "time to the target"}


def run(job: Job) -> None:
    """Trains all runs and writes rows, tables, figures and report; resumes an interrupted job."""
    chosen = PRESETS[job.preset]
    entered = submissions(None if job.selection.optimizer is None else job.one_optimizer(""))
    tasks, groups = job.tasks(chosen["tasks"]), []
    for task in tasks:
        for optimizer in dict.fromkeys(("adamw", *(each.optimizer for each in entered))):
            specs = make_specs(("cosine",), GRID, TUNING_SEEDS) if optimizer == "adamw" else []
            specs += [
                RunSpec(each.schedule, each.learning_rate, seed, label=each.name)
                for each in entered
                if each.optimizer == optimizer
                for seed in range(chosen["seeds"])
            ]
            groups.append(Group(task, optimizer, specs))
    described = {"preset": chosen, "submissions": entered, "grid": GRID}
    sweep = Sweep(job, Settings(chosen["steps"], EVALUATIONS), described)
    sweep.train(groups)
    runs = sweep.finish()

    measured = time_to_target(runs)
    table = summarize(measured)
    scores = "Scores: area under the performance profile from 1 to 4"
    print_table(job.console, scores, _HEADERS, _cells(table))
    medians = by_task(measured)
    print_table(job.console, "Steps to the target, % of all", _task_headers(medians), _task_cells(medians))
    publish(
        job,
        "Leaderboard",
        f"{len(tasks)} tasks, {chosen['steps']} steps, {chosen['seeds']} seeds, default settings, "
        "nothing tuned. Target: the held-out loss of AdamW with a cosine schedule and a tuned initial rate "
        "after 75% of the steps; evaluated every 5% of the steps. Times are of this machine, whose cores "
        "the runs share; numbers of steps ignore the cost of a step.",
        tables={"scores": table, "tasks": medians},
        figures={"profiles": draw(measured)},
        sections=_sections(measured, table, medians),
        recomputed_by="experiments.studies.leaderboard.time_to_target, then summarize and by_task",
        schedules=[each.schedule for each in entered],
    )


def targets(runs: pl.DataFrame) -> dict[str, float]:
    """The target of each task, a held-out loss."""
    tuned = runs.filter(pl.col("seed").is_in(TUNING_SEEDS))
    result = {}
    for (task,), cell in tuned.group_by(["task"], maintain_order=True):
        means = []
        for _, own in cell.group_by(["learning_rate"], maintain_order=True):
            histories = np.array(own["test_losses"].to_list(), float)
            means.append(histories.mean(axis=0))
        finals = np.array([np.where(np.isfinite(mean[-1]), mean[-1], np.inf) for mean in means])
        result[task] = float(means[int(np.argmin(finals))][_TARGET_AT])
    return result


def time_to_target(runs: pl.DataFrame) -> pl.DataFrame:
    """One row per run of a submission.

    Args:
      runs: the rows of ``runs.parquet``.

    Returns:
      A frame with ``submission``, ``schedule``, ``task``, ``seed``, ``steps`` (the fraction of the steps
      after which the target is reached) and ``seconds`` (the time until then); infinite if it is not reached.
    """
    goal, rows = targets(runs), []
    for row in reported(runs).iter_rows(named=True):
        history = np.array(row["test_losses"], float)
        reached = np.flatnonzero(history <= goal[row["task"]])
        steps = (reached[0] + 1) / len(history) if len(reached) else np.inf
        rows.append(
            {
                "submission": row["label"],
                "schedule": row["schedule"],
                "task": row["task"],
                "seed": row["seed"],
                "steps": float(steps),
                "seconds": float(steps * row["seconds"]),
            }
        )
    return pl.DataFrame(rows)


def by_task(measured: pl.DataFrame) -> pl.DataFrame:
    """Medians over the seeds of each submission and task, with the columns of :func:`time_to_target`."""
    return measured.group_by(["submission", "task"], maintain_order=True).agg(
        pl.col("steps").median(), pl.col("seconds").median()
    )


def profile(times: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Performance profiles as defined by AlgoPerf.

    Args:
      times: times to the target, shape (submissions, tasks); infinite if it was not reached.
      factors: shape (factors,), >= 1.

    Returns:
      Shape (submissions, factors): the fraction of tasks on which a submission took at most that many times
      as long as the fastest one. A task whose target no submission reached counts against all.

    Examples:
      >>> profile(np.array([[1.0, 4.0, np.inf], [2.0, 2.0, np.inf]]), np.array([1.0, 2.0]))
      array([[0.333..., 0.666...],
             [0.333..., 0.666...]])
    """
    return (_ratios(times)[:, :, None] <= factors * (1 + 1e-9)).mean(axis=1)


def _ratios(times: np.ndarray) -> np.ndarray:
    """Times divided by the shortest time of each task; infinite if no submission reached the target."""
    fastest = times.min(axis=0)
    solved = np.isfinite(fastest)
    return np.where(solved, times / np.where(solved, fastest, 1.0), np.inf)


def score(times: np.ndarray) -> np.ndarray:
    """The area under each profile from 1 to 4, divided by 3; shape (submissions,).

    Examples:
      >>> score(np.array([[1.0, 1.0], [2.0, 9.0]])).round(3)
      array([1.   , 0.333])
    """
    return (np.clip(MAX_FACTOR - _ratios(times), 0, None) / (MAX_FACTOR - 1)).mean(axis=1)


def _looks(measured: pl.DataFrame) -> dict[str, Look]:
    """The colour and line style of each submission, those of its schedule."""
    names = measured.select("submission", "schedule").unique(maintain_order=True)
    return {name: parse(schedule)[0].look for name, schedule in names.iter_rows()}


def _times(measured: pl.DataFrame, cost: str) -> np.ndarray:
    """Medians over seeds, shape (submissions, tasks), in the order of :func:`_looks`."""
    table = by_task(measured)
    tasks = table["task"].unique(maintain_order=True)
    return np.array(
        [
            [
                table.filter((pl.col("submission") == name) & (pl.col("task") == task))[cost][0]
                for task in tasks
            ]
            for name in _looks(measured)
        ]
    )


def summarize(measured: pl.DataFrame) -> pl.DataFrame:
    """One row for each submission, the best score by time first.

    Returns:
      A frame with ``submission``; ``score_steps`` and ``score_seconds`` of the medians over seeds, with the
      minimum and maximum over single seeds (``score_steps_low``, ``score_steps_high``, ...);
      ``reached``: the percent of tasks whose target it reached.
    """
    seeds = measured["seed"].unique(maintain_order=True)
    columns: dict[str, Any] = {"submission": list(_looks(measured))}
    for name in COSTS:
        alone = np.array([score(_times(measured.filter(pl.col("seed") == seed), name)) for seed in seeds])
        columns[f"score_{name}"] = score(_times(measured, name))
        columns[f"score_{name}_low"], columns[f"score_{name}_high"] = alone.min(axis=0), alone.max(axis=0)
    columns["reached"] = 100 * np.isfinite(_times(measured, "steps")).mean(axis=1)
    return pl.DataFrame(columns).sort("score_seconds", descending=True)


_HEADERS = ("submission", "by time [single seeds]", "by steps [single seeds]", "targets reached, %")


def _cells(table: pl.DataFrame) -> list[list[str]]:
    def scores(row: dict[str, Any], name: str) -> str:
        low, high = row[f"score_{name}_low"], row[f"score_{name}_high"]
        return f"{row[f'score_{name}']:.3f} [{low:.3f}, {high:.3f}]"

    return [
        [row["submission"], scores(row, "seconds"), scores(row, "steps"), f"{row['reached']:.0f}"]
        for row in table.iter_rows(named=True)
    ]


def _task_headers(tasks: pl.DataFrame) -> list[str]:
    return ["submission", *tasks["task"].unique(maintain_order=True)]


def _task_cells(tasks: pl.DataFrame) -> list[list[str]]:
    cells = []
    for (name,), own in tasks.group_by(["submission"], maintain_order=True):
        steps = ("-" if np.isinf(value) else f"{100 * value:.0f}" for value in own["steps"])
        cells.append([name, *steps])
    return cells


def draw(measured: pl.DataFrame) -> plt.Figure:
    """Performance profiles, by steps and by time."""
    factors = np.linspace(1, MAX_FACTOR, 301)
    figure, panels = drawing.panels(len(COSTS), len(COSTS), width=6, height=4.4)
    for axes, (name, title) in zip(panels, COSTS.items(), strict=True):
        curves = profile(_times(measured, name), factors)
        for (label, look), curve in zip(_looks(measured).items(), curves, strict=True):
            width = 2.4 if look == SCHEDULES["GreedyLR"].look else 1.4
            axes.plot(factors, curve, **look.matplotlib(), lw=width, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("factor of the shortest time")
        axes.set_ylabel("fraction of tasks")
        axes.set_ylim(-0.02, 1.02)
    drawing.add_legend(figure, panels[0], columns=4)
    figure.suptitle("Performance profiles: default settings, nothing tuned", fontsize=12)
    return figure


def _sections(measured: pl.DataFrame, table: pl.DataFrame, tasks: pl.DataFrame) -> list[html.Section]:
    factors = np.linspace(1, MAX_FACTOR, 301)
    sections = [
        html.Section(
            "Scores",
            "Area under the profile from 1 to 4, of the medians over the seeds. In brackets: minimum and "
            "maximum over the seeds one by one, which need not contain it.",
            [html.Table(_HEADERS, _cells(table))],
        )
    ]
    for name, title in COSTS.items():
        curves = [
            html.Curve(label, factors, curve, look.plotly())
            for (label, look), curve in zip(
                _looks(measured).items(), profile(_times(measured, name), factors), strict=True
            )
        ]
        figure = html.line_figure(curves, "factor of the shortest time", "fraction of tasks")
        sections.append(html.Section(f"Profiles: {title}", "", [figure]))
    each_task = html.Table(_task_headers(tasks), _task_cells(tasks))
    sections.append(html.Section("Steps to the target, % of all", "-: not reached.", [each_task]))
    return sections
