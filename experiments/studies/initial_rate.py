"""Rules without a learning rate, and defaults that nobody tunes, against cosine at the best of seven rates.

Every entry of the suite (:mod:`experiments.tasks.suite`) is a task with an optimizer. The reference is
that optimizer with a cosine schedule at the best of seven learning rates, two for each factor of ten. Which
one is best is decided by the median over the same seeds, so the reference is slightly optimistic. The gap of
a rule is how much worse its median is, in tolerances; a tolerance is 2 points of accuracy, or 10% of the
reference's loss or return.

Runs of a folder are kept: a call that selects other tasks or rules trains only what is missing, and
``--fresh`` discards them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import polars as pl

from experiments.errors import UsageError
from experiments.options import names, one_of
from experiments.reporting import drawing, html, palette
from experiments.reporting.palette import Look
from experiments.reporting.summary import confidence_interval, interval_text
from experiments.reporting.tables import print_table
from experiments.studies.base import Job, Selection, Sweep, publish
from experiments.tasks import make_task
from experiments.tasks.base import Task
from experiments.tasks.suite import SUITE, SuiteEntry, half
from experiments.training.engine import RunSpec, Settings
from experiments.training.schedules import parse
from experiments.training.sweep import Group


class Rule(NamedTuple):
    """A schedule or rule with a learning rate that is the same for all tasks.

    Attributes:
      name: on the command line and in the rows.
      title: in tables and figures.
      schedule: key of :data:`experiments.training.schedules.SCHEDULES`.
      rate: the learning rate.
      unit: what ``rate`` is a multiple of: "optimizer", the middle of the task's rates for its optimizer
        (1e-3 for AdamW); "adamw", 1000 times that of AdamW, which is the unit of the parameters; "", 1.
      own_look: colour and line style in figures; None: those of the schedule.
    """

    name: str
    title: str
    schedule: str
    rate: float = 1.0
    unit: str = ""
    own_look: Look | None = None

    def learning_rate(self, task: Task, optimizer: str) -> float:
        """The learning rate for a task and an optimizer."""
        if self.unit == "optimizer":
            return self.rate * task.learning_rates[optimizer][1]
        return self.rate * (1e3 * task.learning_rates["adamw"][1] if self.unit else 1.0)

    @property
    def look(self) -> Look:
        """Its colour and line style in figures."""
        return self.own_look or parse(self.schedule)[0].look


REFERENCE = tuple(
    Rule(f"cosine x{10 ** (exponent / 2):.3g}", "", "cosine", 10 ** (exponent / 2), "optimizer")
    for exponent in range(-2, 5)
)
RULES = {
    rule.name: rule
    for rule in (
        Rule("cosine-1e-3", "cosine at 1e-3", "cosine", 1.0, "optimizer", Look(palette.SKY, ":")),
        Rule("cosine-1e-2", "cosine at 1e-2", "cosine", 10.0, "optimizer"),
        Rule("warmup-cosine", "warm-up and cosine at 1e-2", "warmup-cosine", 10.0, "optimizer"),
        Rule("prodigy", "Prodigy", "prodigy"),
        Rule("prodigy-cosine", "Prodigy with cosine", "prodigy-cosine"),
        Rule("schedule-free", "schedule-free AdamW", "schedule-free", 2.5e-3, "adamw"),
        Rule("dog", "DoG", "dog"),
        Rule("mechanic", "Mechanic", "mechanic"),
        Rule("auto", "auto_lr", "auto"),
        Rule("auto-without-steps", "auto_lr without total_steps", "auto-without-steps"),
    )
}
# Variants of auto_lr among which its constants were chosen, see docs/auto.md; only --rule selects them.
VARIANTS = {
    f"relative-{maximum:g}-{percent}": Rule(
        f"relative-{maximum:g}-{percent}",
        f"relative step up to {maximum:g}, warm-up {percent}%",
        f"relative(maximum={maximum}, warm_up={percent / 100})",
        own_look=Look(color, line),
    )
    for maximum, color in (
        (0.005, palette.SKY),
        (0.01, palette.BLUE),
        (0.02, palette.GREEN),
        (0.03, palette.BLACK),
        (0.04, palette.ORANGE),
        (0.08, palette.RED),
    )
    for percent, line in ((2, ":"), (30, "--"), (50, "-."))
}
EVERY_RULE = RULES | VARIANTS
POINTS = 2.0  # tolerance of accuracies
PERCENT = 10.0  # tolerance of losses and returns
CLIP = 3.0  # of gaps in their mean, tolerances
RESAMPLES = 1000  # of the seeds
MIN_STEPS = 20
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "tasks": ("matrix-completion", "outliers-gross", "cancer-logistic", "mnist1d-depth-2"),
        "steps": (250,),
        "seeds": 3,
    },
    "full": {"tasks": None, "steps": (250, 1000, 5000), "seeds": 3},
}


class Selected(NamedTuple):
    """What to train and to report."""

    entries: list[SuiteEntry]
    rules: list[Rule]
    steps: list[int]
    seeds: int


def select(preset: str, selection: Selection) -> Selected:
    """The part of the study that the command line selects; raises ``UsageError`` if there is none."""
    chosen = PRESETS[preset]
    split, tasks = selection.split, chosen["tasks"]
    if split is not None:
        one_of("--split", split, ("development", "held-out"))
        tasks = None
    allowed = SUITE if split is None else {entry.name: entry for entry in half(split)}
    if selection.task is not None:
        tasks = names("--task", selection.task, allowed)
    if tasks is None:
        tasks = [entry.name for entry in half(split or "development")]
    rules = list(RULES) if selection.rule is None else names("--rule", selection.rule, EVERY_RULE)
    steps = list(chosen["steps"])
    if selection.steps is not None:
        texts = selection.steps.split(",")
        if not all(text.strip().isdecimal() and int(text) >= MIN_STEPS for text in texts):
            raise UsageError(f"--steps must be integers of at least {MIN_STEPS}, got {selection.steps!r}")
        steps = [int(text) for text in texts]
    return Selected(
        [SUITE[name] for name in tasks], [EVERY_RULE[name] for name in rules], steps, chosen["seeds"]
    )


def run(job: Job) -> None:
    """Trains what is missing and writes rows, tables, figures and report, in one folder for each length."""
    selected = select(job.preset, job.selection)
    for steps in selected.steps:
        _run(job.in_folder(f"{steps}-steps"), selected, steps)


def _run(job: Job, selected: Selected, steps: int) -> None:
    groups = []
    for entry in selected.entries:
        task = make_task(entry.task)
        # The reference includes the runs of the two rules that are a cosine at one rate.
        rules = [*REFERENCE, *(rule for rule in selected.rules if rule.schedule != "cosine")]
        specs = [
            RunSpec(rule.schedule, rule.learning_rate(task, entry.optimizer), seed, label=rule.name)
            for rule in rules
            for seed in range(selected.seeds)
        ]
        groups.append(Group(entry.task, entry.optimizer, specs, entry.accumulation))
    sweep = Sweep(job, Settings(steps), {}, extensible=True)  # each row has its schedule and rate
    sweep.train(groups)
    report(job, sweep.finish(), selected, steps)


def report(job: Job, runs: pl.DataFrame, selected: Selected, steps: int) -> None:
    """Prints and writes tables, figures and the report for one number of steps."""
    measured = measure(runs, selected.entries, selected.rules)
    by_rule, by_task = summarize(measured), gaps(measured)
    print_table(job.console, f"{steps} steps, by rule", _RULE_HEADERS, _rule_cells(by_rule), left=1)
    headers, cells = _task_cells(by_task)
    print_table(job.console, f"{steps} steps, medians; +: better, -: worse", headers, cells, left=1)
    curves = [
        html.Curve(
            EVERY_RULE[name].title,
            _AXIS,
            profile(own["gap"].to_numpy(), _AXIS),
            EVERY_RULE[name].look.plotly(),
        )
        for (name,), own in by_task.group_by(["rule"], maintain_order=True)
    ]
    publish(
        job,
        f"Rules without a learning rate: {steps} steps, {selected.seeds} seeds",
        _EXPLANATION,
        tables={"rules": by_rule, "tasks": by_task},
        figures={"rules": draw(measured)},
        sections=[
            html.Section("By rule", _INTERVALS, [html.Table(_RULE_HEADERS, _rule_cells(by_rule))]),
            html.Section(
                "Performance profiles",
                "The fraction of tasks whose gap is at most that of the horizontal axis.",
                [html.line_figure(curves, "gap, tolerances", "fraction of tasks")],
            ),
            html.Section(
                "By task", "Medians over the seeds; +: better, -: worse.", [html.Table(headers, cells)]
            ),
        ],
        recomputed_by="experiments.studies.initial_rate.measure, then summarize and gaps",
    )


class Measured(NamedTuple):
    """The results of one entry.

    Attributes:
      entry: name of the entry.
      measure: kind of its metric, as in :class:`experiments.tasks.base.Task`.
      rates: learning rates of the reference.
      reference: metrics of the reference, shape (rates, seeds).
      rules: for each rule its metrics, shape (seeds,).
    """

    entry: str
    measure: str
    rates: np.ndarray
    reference: np.ndarray
    rules: dict[str, np.ndarray]

    @property
    def best(self) -> int:
        """Index of the best rate of the reference, by the median over seeds."""
        medians = np.median(self.reference, axis=1)
        diverged = -np.inf if self.measure != "loss" else np.inf
        medians = np.where(np.isfinite(medians), medians, diverged)
        return int(np.argmin(medians) if self.measure == "loss" else np.argmax(medians))

    def gap(self, values: np.ndarray) -> np.ndarray:
        """How much worse medians over the last axis are than the reference's at its best rate, tolerances."""
        return gap(self.measure, np.median(values, axis=-1), np.median(self.reference[self.best]))


def gap(measure: str, values: np.ndarray, references: np.ndarray) -> np.ndarray:
    """How much worse values are than references, in tolerances; infinite for values that are not finite.

    Examples:
      >>> gap("accuracy", np.array([0.95, 0.99]), np.array(0.97)).round(3)
      array([ 1., -1.])
      >>> gap("loss", np.array([1.1, np.nan]), np.array(1.0)).round(3)
      array([ 1., inf])
    """
    worse = values - references if measure == "loss" else references - values
    tolerance = POINTS / 100 if measure == "accuracy" else PERCENT / 100 * np.abs(references)
    with np.errstate(divide="ignore", invalid="ignore"):
        gaps = np.where(worse == 0, 0.0, worse / tolerance)
    return np.where(np.isfinite(values), gaps, np.inf)


def outcome(gaps: np.ndarray) -> np.ndarray:
    """-1: better, 0: within the tolerance, 1: worse."""
    slack = 1 + 1e-6  # metrics are float32
    return (gaps > slack).astype(int) - (gaps < -slack)


def measure(runs: pl.DataFrame, entries: Sequence[SuiteEntry], rules: Sequence[Rule]) -> list[Measured]:
    """The results of the entries from the rows of ``runs.parquet``.

    Raises:
      UsageError: if runs are missing.
    """
    result = []
    for entry in entries:
        task = make_task(entry.task)
        own = runs.filter(task=entry.task, optimizer=entry.optimizer)
        values = {}
        for rule in (*REFERENCE, *rules):
            rate = rule.learning_rate(task, entry.optimizer)
            close = (pl.col("learning_rate") / rate - 1).abs() < 1e-6
            values[rule] = own.filter(close, schedule=rule.schedule).sort("seed")["test_metric"].to_numpy()
            if not len(values[rule]):
                raise UsageError(f"there are no runs of {entry.name} with {rule.name}")
        rates = np.array([rule.learning_rate(task, entry.optimizer) for rule in REFERENCE])
        reference = np.stack([values[rule] for rule in REFERENCE])
        by_name = {rule.name: values[rule] for rule in rules}
        result.append(Measured(entry.name, task.measure, rates, reference, by_name))
    return result


def gaps(measured: Sequence[Measured]) -> pl.DataFrame:
    """One row for each entry and rule, grouped by rule.

    Returns:
      A frame with ``task`` (the entry's name), ``rule``, ``measure``; ``best_rate`` and ``reference`` of the
      reference; ``value`` of the rule; ``gap`` in tolerances; and ``outcome``.
    """
    rows = []
    for rule in measured[0].rules:
        for each in measured:
            found = float(each.gap(each.rules[rule]))
            rows.append(
                {
                    "task": each.entry,
                    "rule": rule,
                    "measure": each.measure,
                    "best_rate": float(each.rates[each.best]),
                    "reference": float(np.median(each.reference[each.best])),
                    "value": float(np.median(each.rules[rule])),
                    "gap": found,
                    "outcome": {-1: "better", 0: "equal", 1: "worse"}[int(outcome(np.array(found)))],
                }
            )
    return pl.DataFrame(rows)


def summarize(measured: Sequence[Measured]) -> pl.DataFrame:
    """One row for each rule.

    Returns:
      A frame with ``rule`` and ``tasks``; ``within``, ``better``, ``equal`` and ``worse``: numbers of tasks,
      each with a 95% bootstrap interval over the seeds (``within_low``, ``within_high``, ...); ``mean``: the
      mean gap, each clipped to 3 tolerances, with a 95% interval over the tasks; ``worst`` and
      ``worst_task``: the largest gap; and ``auto_better``, ``auto_equal``, ``auto_worse``: auto_lr against
      this rule, with the rule as the reference (null if auto_lr is not among the rules).
    """
    rng = np.random.default_rng(0)
    seeds = measured[0].reference.shape[1]
    drawn = rng.integers(seeds, size=(len(measured), RESAMPLES, seeds))
    rows = []
    for rule in measured[0].rules:
        found = np.array([each.gap(each.rules[rule]) for each in measured])
        resampled = np.stack(
            [
                gap(
                    each.measure,
                    np.median(each.rules[rule][seeds], axis=-1),
                    np.median(each.reference[each.best][seeds], axis=-1),
                )
                for each, seeds in zip(measured, drawn, strict=True)
            ],
            axis=1,
        )  # shape=(resamples, tasks)
        row: dict[str, Any] = {"rule": rule, "tasks": len(measured)}
        for name, wanted in _COUNTS.items():
            row[name] = int(np.isin(outcome(found), wanted).sum())
            counts = np.isin(outcome(resampled), wanted).sum(axis=1)
            row[f"{name}_low"], row[f"{name}_high"] = (int(np.quantile(counts, q)) for q in (0.025, 0.975))
        clipped = np.clip(found, -CLIP, CLIP)
        row["mean"] = float(clipped.mean())
        row["mean_low"], row["mean_high"] = confidence_interval(clipped)
        worst = int(np.argmax(found))
        row["worst"], row["worst_task"] = float(found[worst]), measured[worst].entry
        rows.append(row | _against_auto(measured, rule))
    return pl.DataFrame(rows)


_COUNTS: Mapping[str, tuple[int, ...]] = {"within": (-1, 0), "better": (-1,), "equal": (0,), "worse": (1,)}


def _against_auto(measured: Sequence[Measured], rule: str) -> dict[str, int | None]:
    """On how many tasks ``auto_lr`` is better, equal and worse than a rule."""
    keys = ("auto_better", "auto_equal", "auto_worse")
    if rule == "auto" or "auto" not in measured[0].rules:
        return dict.fromkeys(keys)
    found = [
        int(outcome(gap(each.measure, np.median(each.rules["auto"]), np.median(each.rules[rule]))))
        for each in measured
    ]
    return {key: found.count(sign) for key, sign in zip(keys, (-1, 0, 1), strict=True)}


def profile(gaps: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """The fraction of gaps that are at most each value of ``axis``.

    Examples:
      >>> profile(np.array([-1.0, 0.0, np.inf, 0.5]), np.array([0.0, 1.0]))
      array([0.5 , 0.75])
    """
    return (gaps[:, None] <= axis).mean(axis=0)


_AXIS = np.linspace(-4, 8, 481)
_EXPLANATION = (
    "Reference: the optimizer of the task with a cosine schedule at the best of "
    f"{len(REFERENCE)} rates. Gaps are in tolerances of {POINTS:g} points of accuracy, or {PERCENT:g}% of "
    "the loss or return; positive is worse. A rule is worse, or better, if its gap is above 1, or below -1. "
    "Rates of 1e-3 and 1e-2 are those of AdamW; for other optimizers they are the middle of the grid and ten "
    "times that. Prodigy, schedule-free AdamW and DoG do not depend on the optimizer of the task."
)
_INTERVALS = (
    "In brackets: 95% bootstrap interval over the seeds for numbers of tasks, 95% interval over the tasks "
    f"for the mean gap, whose terms are clipped to {CLIP:g}. The last column counts the tasks on which "
    "auto_lr is better, equal and worse than the rule."
)
_RULE_HEADERS = (
    "rule",
    "within tolerance",
    "better",
    "equal",
    "worse",
    "mean gap",
    "worst gap",
    "auto_lr against it",
)


def _rule_cells(table: pl.DataFrame) -> list[list[str]]:
    rows = []
    for row in table.iter_rows(named=True):
        counts = [f"{row[name]} [{row[f'{name}_low']}, {row[f'{name}_high']}]" for name in _COUNTS]
        counts[0] = counts[0].replace(" ", f" of {row['tasks']} ", 1)
        against = ""
        if row["auto_better"] is not None:
            against = "{auto_better} / {auto_equal} / {auto_worse}".format(**row)
        mean = interval_text(row, ".2f", "mean")
        worst = "{worst:.1f}, {worst_task}".format(**row)
        rows.append([EVERY_RULE[row["rule"]].title, *counts, mean, worst, against])
    return rows


def _text(measure: str, value: float) -> str:
    return f"{100 * value:.1f}%" if measure == "accuracy" else f"{value:.3g}"


def _task_cells(table: pl.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the table with a row for each task and a column for each rule."""
    rules = table["rule"].unique(maintain_order=True).to_list()
    headers = ["task", "best rate", "cosine", *rules]
    rows = []
    for (task,), own in table.group_by(["task"], maintain_order=True):
        first = own.row(0, named=True)
        cells = [task, f"{first['best_rate']:.2g}", _text(first["measure"], first["reference"])]
        for row in own.iter_rows(named=True):
            mark = {"better": " +", "equal": "", "worse": " -"}[row["outcome"]]
            cells.append(_text(row["measure"], row["value"]) + mark)
        rows.append(cells)
    return headers, rows


def draw(measured: Sequence[Measured]) -> plt.Figure:
    """Left: the gap of cosine against its rate, a line for each task. Right: the profiles of the rules."""
    figure, (left, right) = drawing.panels(2, 2, width=5.6, height=4.2)
    factors = [rule.rate for rule in REFERENCE]
    curves = np.array([each.gap(each.reference) for each in measured])
    for curve in curves:
        left.plot(factors, np.minimum(curve, 8), color=drawing.BLUE, lw=0.6, alpha=0.5)
    left.plot(factors, np.minimum(np.median(curves, axis=0), 8), color=drawing.BLUE, lw=2.4)
    left.axhline(1, color=drawing.GREY, ls="--", lw=1)
    left.set_xscale("log")
    left.set_xlabel("learning rate of cosine / middle rate of the optimizer")
    left.set_ylabel("gap, tolerances")
    left.set_title("cosine at one rate for all tasks", fontsize=10)
    for rule in measured[0].rules:
        found = np.array([each.gap(each.rules[rule]) for each in measured])
        width = 2.6 if rule == "auto" else 1.4
        curve = profile(found, _AXIS)
        right.plot(_AXIS, curve, lw=width, label=EVERY_RULE[rule].title, **EVERY_RULE[rule].look.matplotlib())
    right.axvline(1, color=drawing.GREY, ls="--", lw=1)
    right.set_xlabel("gap, tolerances")
    right.set_ylabel("fraction of tasks with at most that gap")
    right.set_ylim(-0.02, 1.02)
    right.set_title("rules that are not tuned", fontsize=10)
    drawing.add_legend(figure, right, columns=5)
    return figure
