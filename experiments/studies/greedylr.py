"""Tables II to X and figures 1 to 7 of "Zeroth Order GreedyLR": six kinds of tasks and four pairs of an
optimizer and a schedule, compared with GreedyLR with the same optimizer, seed, batches and initial rate.

The paper fine-tunes published models; this study trains smaller ones on local data, from scratch and, in rows
of their own, from the networks of ``python -m experiments pretrain``. The paper's numbers are in
``published/greedylr_tables.csv``, transcribed from Tables V to X. (In Table X a row of xlm-roberta-base is
printed under camembert-large, which has two rows for SGD; it is moved back.) Its "final loss delta" is the
baseline's loss minus GreedyLR's, contrary to its header: positive if GreedyLR is better.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import plotly.graph_objects as go
import polars as pl

from experiments.pretraining import pretrain_for
from experiments.reporting import drawing, html
from experiments.reporting.summary import GREEDYLR, STAGES, TIE_BAND, confidence_interval, stage_losses
from experiments.reporting.tables import print_table
from experiments.studies.base import Job, Sweep, publish, read_published
from experiments.tasks import FINE_TUNING_TASKS
from experiments.tasks.base import LEARNING_RATES
from experiments.training.engine import Settings, make_specs
from experiments.training.schedules import SCHEDULES
from experiments.training.sweep import Group

PAIRS = {"adamw": "linear", "adafactor": "cosine", "adagrad": "polynomial", "sgd": "warmup"}
DEFAULT = "linear"  # the reference trainer's, for optimizers that the paper does not use
FURTHER = ("exponential",)  # further schedules, with every optimizer, in a table of their own
# Kind of task: the paper's table and the tasks of this study; the preset quick has the first task only.
KINDS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "translation": ("V", ("translation-fr", "translation-de", "translation-es")),
    "question answering": ("VI", ("question-answering",)),
    "image classification": ("VII", ("digits-resnet", "digits-vit", "digits")),
    "segmentation": ("VIII", ("segmentation",)),
    "summarization": ("IX", ("summarization",)),
    "tagging": ("X", ("tagging",)),
}
# The same kinds from pretrained networks, in rows of their own; the preset says how many of them.
FINE_TUNED: Mapping[str, str] = {
    "tagging": "tagging-finetuned",
    "question answering": "question-answering-finetuned",
    "image classification": "digits-finetuned",
    "translation": "translation-fr-finetuned",
    "summarization": "summarization-finetuned",
}
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"tasks": 1, "fine_tuned": 2, "rates": 3, "steps": 200, "seeds": 3},
    "full": {"tasks": 3, "fine_tuned": 5, "rates": 3, "steps": 1000, "seeds": 5},
}
# Shown in figures 2 to 7: (kind, optimizer).
SHOWN = (("image classification", "adagrad"), ("summarization", "adafactor"), ("tagging", "sgd"))
OUTCOMES = ("yes", "yes*", "no", "no*")
# Table II of the paper, and Tables III and IV, as printed.
PRINTED = {
    "yes": "48",
    "yes*": "64",
    "no": "26",
    "no*": "58",
    "sum": "196",
    "final delta in +/- 0.1": "39",
    "overall as good or better, %": "86.73",
    "overall better, %": "57.14",
    "overall worse, %": "13.27",
    "final as good or better, %": "91.67",
    "final worse, %": "8.33",
    "overall as good, %": "62.24",
    "clearly better, %": "24.49",
    "average benefit": "0.16",
    "maximum benefit": "2.3",
    "maximum deficit": "-0.62",
    "as good or better at 10%, %": "92.42",
    "as good or better at 50%, %": "81.81",
    "as good or better at 100%, %": "85.94",
}


def run(job: Job) -> None:
    """Trains all runs and writes rows, tables, figures and report; resumes an interrupted job."""
    chosen = PRESETS[job.preset]
    fine_tuned = list(FINE_TUNED.values())[: chosen["fine_tuned"]]
    tasks = job.tasks([task for _, tasks in KINDS.values() for task in tasks[: chosen["tasks"]]] + fine_tuned)
    optimizers = job.optimizers(tuple(PAIRS))
    pretrain_for(tasks, job.console)
    groups = [
        Group(
            task,
            optimizer,
            make_specs(
                (baseline_of(optimizer), *FURTHER, GREEDYLR),
                LEARNING_RATES[optimizer][: chosen["rates"]],
                range(chosen["seeds"]),
                label=kind_of(task),
            ),
        )
        for task in tasks
        for optimizer in optimizers
    ]
    described = {"preset": chosen, "pairs": PAIRS, "further": FURTHER, "kinds": KINDS}
    sweep = Sweep(job, Settings(chosen["steps"]), described)
    sweep.train(groups)
    runs = sweep.finish()

    table, further = summarize(runs), pl.concat([summarize(runs, name) for name in FURTHER])
    is_fine_tuned = pl.col("task").is_in(list(FINE_TUNING_TASKS))
    scratch, tuned, paper = (
        tally(each) for each in (table.filter(~is_fine_tuned), table.filter(is_fine_tuned), published())
    )
    rows = [(name, scratch[name], tuned[name], paper[name], PRINTED[name]) for name in PRINTED]
    print_table(job.console, "Tables II to IV", _SUMMARY_HEADERS, rows)
    for kind in table["kind"].unique(maintain_order=True):
        print_table(job.console, _title(kind), _HEADERS, _cells(table, kind), left=4)
    conclusion = " ".join([_conclude(table), *(_conclude(further.filter(schedule=name)) for name in FURTHER)])
    job.console.print(conclusion)
    publish(
        job,
        "GreedyLR against common schedules",
        f"Six kinds of tasks, {chosen['steps']} steps, {chosen['seeds']} seeds, the published settings of "
        "GreedyLR. Yes: GreedyLR's loss is lower; *: by less than 0.1; losses are means over seeds of the "
        "mean over the 5% of steps before a stage. Difference: the baseline's final loss minus GreedyLR's, "
        "with "
        f"its 95% confidence interval over seeds; positive if GreedyLR is better. {conclusion}",
        tables={
            "table": table,
            "further": further,
            "summary": pl.DataFrame(rows, schema=list(_SUMMARY_HEADERS), orient="row"),
        },
        figures={"fig1_histogram": draw_histogram(runs), "fig2_to_7": draw_histories(runs)},
        sections=_sections(runs, table, further, rows),
        recomputed_by="experiments.studies.greedylr.summarize (a row per experiment), then tally",
        schedules=runs["schedule"].unique(maintain_order=True).to_list(),
    )


def baseline_of(optimizer: str) -> str:
    """The schedule that the paper pairs with an optimizer."""
    return PAIRS.get(optimizer, DEFAULT)


def kind_of(task: str) -> str:
    """The kind of a task, a key of :data:`KINDS`, or "other"."""
    own = (kind for kind, (_, tasks) in KINDS.items() if task in (*tasks, FINE_TUNED.get(kind)))
    return next(own, "other")


def _title(kind: str) -> str:
    return f"Table {KINDS[kind][0]}: {kind}" if kind in KINDS else "Other tasks"


def published() -> pl.DataFrame:
    """Tables V to X of the paper, a row per experiment, with the columns of :func:`summarize`."""
    return read_published("greedylr_tables")


def summarize(runs: pl.DataFrame, baseline: str | None = None) -> pl.DataFrame:
    """One row for each task, optimizer and initial rate: an experiment of the paper's tables.

    Args:
      runs: the rows of ``runs.parquet``.
      baseline: the schedule that GreedyLR is compared with; None: that which the paper pairs with the
        optimizer.

    Returns:
      A frame with ``kind``, ``task``, ``steps``, ``learning_rate``, ``optimizer``, ``schedule``; ``at_10``,
      ``at_50``, ``at_100``: whether GreedyLR's mean loss is lower ("yes", "no"; "*" if by less than 0.1;
      "dnf" if the baseline's loss is not finite); ``difference`` with ``difference_low`` and
      ``difference_high``: the mean over seeds of the baseline's final loss minus GreedyLR's, and its 95%
      confidence interval.
    """
    rows = []
    for (task, optimizer, rate), cell in runs.group_by(
        ["task", "optimizer", "learning_rate"], maintain_order=True
    ):
        schedule = baseline or baseline_of(optimizer)
        losses = {}
        for name in (schedule, GREEDYLR):
            own = cell.filter(pl.col("schedule") == name).sort("seed")["loss"].to_list()
            stages = [stage_losses(np.array(loss, float)) for loss in own]
            losses[name] = {stage: np.array([each[stage] for each in stages]) for stage in STAGES}
        differences = _differences(losses[schedule][100], losses[GREEDYLR][100])
        low, high = confidence_interval(differences)
        rows.append(
            {
                "kind": cell["label"][0],
                "task": task,
                "steps": cell["steps"][0],
                "learning_rate": rate,
                "optimizer": optimizer,
                "schedule": schedule,
                **{
                    f"at_{stage}": outcome(
                        float(losses[schedule][stage].mean()), float(losses[GREEDYLR][stage].mean())
                    )
                    for stage in STAGES
                },
                "difference": float(differences.mean()) if np.isfinite(differences).all() else None,
                "difference_low": low,
                "difference_high": high,
            }
        )
    return pl.DataFrame(rows, infer_schema_length=None)


def _differences(baseline: np.ndarray, greedy: np.ndarray) -> np.ndarray:
    """Baseline minus GreedyLR; NaN where either is infinite."""
    finite = np.isfinite(baseline) & np.isfinite(greedy)
    return np.where(finite, np.where(finite, baseline, 0) - np.where(finite, greedy, 0), np.nan)


def outcome(baseline: float, greedy: float) -> str:
    """Whether GreedyLR's loss is lower than the baseline's, in the notation of the paper.

    Examples:
      >>> outcome(1.0, 0.5), outcome(1.0, 0.95), outcome(0.95, 1.0), outcome(0.5, 1.0), outcome(math.inf, 1.0)
      ('yes', 'yes*', 'no*', 'no', 'dnf')
    """
    if not math.isfinite(baseline):
        return "dnf"
    star = "*" if abs(baseline - greedy) < TIE_BAND else ""
    return ("yes" if greedy < baseline else "no") + star


def tally(table: pl.DataFrame) -> dict[str, str]:
    """The numbers of the paper's Tables II to IV for a table of experiments, without "dnf".

    Empty texts for an empty table.
    """
    if table.is_empty():
        return dict.fromkeys(PRINTED, "")
    stages = {stage: [each for each in table[f"at_{stage}"] if each in OUTCOMES] for stage in STAGES}
    everything = [each for stage in stages.values() for each in stage]
    counts = {name: everything.count(name) for name in OUTCOMES}
    total = len(everything)
    deltas = np.array([value for value in table["difference"] if value is not None], float)

    def share(names: Sequence[str], of: Sequence[str] = everything) -> str:
        return f"{100 * sum(each in names for each in of) / len(of):.2f}" if of else ""

    good = ("yes", "yes*", "no*")
    return {
        **{name: str(count) for name, count in counts.items()},
        "sum": str(total),
        "final delta in +/- 0.1": str(int(np.sum(np.abs(deltas) < TIE_BAND))),
        "overall as good or better, %": share(good),
        "overall better, %": share(("yes", "yes*")),
        "overall worse, %": share(("no",)),
        "final as good or better, %": share(good, stages[100]),
        "final worse, %": share(("no",), stages[100]),
        "overall as good, %": share(("yes*", "no*")),
        "clearly better, %": share(("yes",)),
        "average benefit": f"{deltas[deltas > 0].mean():.2g}" if (deltas > 0).any() else "",
        "maximum benefit": f"{deltas.max():.2g}",
        "maximum deficit": f"{deltas.min():.2g}",
        **{f"as good or better at {stage}%, %": share(good, stages[stage]) for stage in STAGES},
    }


_SUMMARY_HEADERS = (
    "",
    "here, from scratch",
    "here, fine-tuned",
    "from the paper's Tables V to X",
    "printed in the paper",
)
_HEADERS = (
    "model and data",
    "optimizer",
    "schedule",
    "",
    "steps",
    "rate",
    "10%",
    "50%",
    "100%",
    "difference",
)


def _cells(table: pl.DataFrame, kind: str) -> list[list[str]]:
    """The rows of this study, then those of the paper."""
    return [
        _row(row, source)
        for source, rows in (("here", table), ("paper", published()))
        for row in rows.filter(pl.col("kind") == kind).iter_rows(named=True)
    ]


def _row(row: Mapping[str, Any], source: str) -> list[str]:
    """The cells of one experiment, "here" or of the "paper"."""
    difference = "" if row["difference"] is None else f"{row['difference']:+.3f}"
    if source == "here" and difference:
        difference += f" [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"
    return [
        row["task"] if source == "here" else f"{row['model']}, {row['dataset']}",
        row["optimizer"],
        row["schedule"],
        source,
        str(row["steps"]),
        f"{row['learning_rate']:g}",
        *(row[f"at_{stage}"] for stage in STAGES),
        difference,
    ]


def _conclude(table: pl.DataFrame) -> str:
    """The number of significant differences, and of experiments in which GreedyLR diverged."""
    better, worse = (table[name].fill_nan(None) for name in ("difference_low", "difference_high"))
    diverged = ((table["at_100"] == "no") & better.is_null()).sum()
    against = ", ".join(SCHEDULES[name].label for name in table["schedule"].unique(maintain_order=True))
    return (
        f"In {len(table)} experiments against {against} the final loss of {GREEDYLR} is significantly lower "
        f"in {(better > 0).sum()} and significantly higher in {(worse < 0).sum()} (95% confidence intervals "
        f"over seeds that exclude 0, not corrected for multiple comparisons); in {diverged} it diverges."
    )


def _deltas(runs: pl.DataFrame) -> list[float]:
    """The final difference of each seed."""
    deltas = []
    for (_, optimizer, _, _), cell in runs.group_by(
        ["task", "optimizer", "learning_rate", "seed"], maintain_order=True
    ):
        final = {
            row["schedule"]: stage_losses(np.array(row["loss"], float))[100]
            for row in cell.iter_rows(named=True)
        }
        deltas.append(final[baseline_of(optimizer)] - final[GREEDYLR])
    return [delta for delta in deltas if math.isfinite(delta)]


def draw_histogram(runs: pl.DataFrame) -> plt.Figure:
    """Figure 1: final differences of this study and of the paper."""
    figure, (axes,) = drawing.panels(1, 1, width=7, height=4)
    bins = np.linspace(-2.4, 2.4, 49)
    for label, deltas, color in (
        ("here, each seed", _deltas(runs), drawing.BLUE),
        ("the paper's Tables V to X", published()["difference"].drop_nulls().to_list(), drawing.ORANGE),
    ):
        clipped = np.clip(deltas, bins[0], bins[-1])
        weights = np.full(len(clipped), 100 / len(clipped))
        axes.hist(clipped, bins, weights=weights, color=color, alpha=0.55, label=f"{label} ({len(clipped)})")
    axes.axvline(0, color=drawing.BLACK, lw=0.8)
    axes.set_xlabel("final loss of the baseline minus GreedyLR's (positive: GreedyLR is better)")
    axes.set_ylabel("experiments, %")
    drawing.add_legend(figure, axes)
    figure.suptitle("Figure 1: distribution of final differences", fontsize=12)
    return figure


def _curves(runs: pl.DataFrame, task: str, optimizer: str, rate: float, column: str) -> dict[str, np.ndarray]:
    """The mean history over seeds of each schedule."""
    cell = runs.filter(
        (pl.col("task") == task) & (pl.col("optimizer") == optimizer) & (pl.col("learning_rate") == rate)
    )
    return {
        name: np.array(cell.filter(pl.col("schedule") == name)[column].to_list(), float).mean(axis=0)
        for name in (baseline_of(optimizer), GREEDYLR)
    }


def draw_histories(runs: pl.DataFrame) -> plt.Figure:
    """Figures 2 to 7: learning rates above losses for three pairs, or for the first pair if none was run."""
    trained = set(runs.select("task", "optimizer").unique().iter_rows())
    shown = [(KINDS[kind][1][0], optimizer) for kind, optimizer in SHOWN]
    shown = [pair for pair in shown if pair in trained] or [runs.select("task", "optimizer").row(0)]
    figure, panels = drawing.panels(2 * len(shown), len(shown), width=4.6, height=3.2)
    for column, (task, optimizer) in enumerate(shown):
        rate = sorted(runs.filter(task=task, optimizer=optimizer)["learning_rate"].unique())
        rate = rate[len(rate) // 2]
        for axes, name in ((panels[column], "rate"), (panels[column + len(shown)], "loss")):
            for schedule, values in _curves(runs, task, optimizer, rate, name).items():
                width = max(1, len(values) // 20) if name == "loss" else 1
                smoothed = drawing.smooth(values, width)
                label = GREEDYLR if schedule == GREEDYLR else "baseline"
                color = drawing.RED if schedule == GREEDYLR else drawing.BLUE
                axes.plot(np.arange(len(smoothed)) + width, smoothed, color=color, lw=1.5, label=label)
            title = "learning rate" if name == "rate" else "training loss"
            axes.set_title(f"{task}, {optimizer}, {baseline_of(optimizer)}, rate {rate:g}", fontsize=9)
            axes.set_xlabel("step")
            axes.set_ylabel(title)
    drawing.add_legend(figure, panels[0])
    figure.suptitle("Figures 2 to 7: mean over seeds; losses smoothed over 5% of the steps", fontsize=12)
    return figure


def _sections(
    runs: pl.DataFrame, table: pl.DataFrame, further: pl.DataFrame, rows: Sequence[Sequence[str]]
) -> list[html.Section]:
    histogram = go.Figure()
    for name, deltas in (
        ("here, each seed", _deltas(runs)),
        ("paper", published()["difference"].drop_nulls()),
    ):
        histogram.add_histogram(
            x=list(deltas), name=name, histnorm="percent", opacity=0.6, xbins={"size": 0.1}
        )
    histogram.update_layout(barmode="overlay", height=380, margin={"t": 20})
    histogram.update_xaxes(title="final loss of the baseline minus GreedyLR's")
    histogram.update_yaxes(title="experiments, %")
    sections = [
        html.Section("Tables II to IV, figure 1", "", [html.Table(_SUMMARY_HEADERS, rows), histogram])
    ]
    for kind in table["kind"].unique(maintain_order=True):
        own = table.filter(kind=kind)
        parts: list[Any] = [html.Table(_HEADERS, _cells(table, kind))]
        parts += [_figure(runs, task) for task in own["task"].unique(maintain_order=True)]
        sections.append(html.Section(_title(kind), "Solid: GreedyLR; dotted: the baseline.", parts))
    cells = [_row(row, "here") for row in further.iter_rows(named=True)]
    return [*sections, html.Section("Further schedules", "", [html.Table(_HEADERS, cells)])]


def _figure(runs: pl.DataFrame, task: str) -> go.Figure:
    """The losses of GreedyLR and of the baseline with each optimizer, at the middle rate."""
    curves = []
    palette = (drawing.BLUE, drawing.GREEN, drawing.ORANGE, drawing.PINK)
    trained = runs.filter(task=task)["optimizer"].unique(maintain_order=True)
    for optimizer, color in zip(trained, itertools.cycle(palette), strict=False):
        rates = sorted(runs.filter(task=task, optimizer=optimizer)["learning_rate"].unique())
        for name, values in _curves(runs, task, optimizer, rates[len(rates) // 2], "loss").items():
            width = max(1, len(values) // 20)
            shown = drawing.smooth(values, width)
            style = drawing.Look(color, "-" if name == GREEDYLR else ":").plotly()
            curves.append(html.Curve(f"{optimizer}, {name}", np.arange(len(shown)) + width, shown, style))
    return html.line_figure(curves, f"step ({task})", "training loss, mean over seeds")
