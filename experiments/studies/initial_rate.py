"""How schedules and rules cope with an initial rate from 1/1000 to 1000 times the best one.

The papers' rules are sold as freeing the user from the choice of a rate. Here each is given seven initial
rates, the same for all, with the same seeds and batches.
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
from experiments.training.engine import Settings, make_specs
from experiments.training.sweep import Group

FACTORS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
# Each with the colour and the line that it is drawn with: dashed what is neither a schedule nor a rule here.
LOOKS = {
    "constant": (drawing.SKY, "-"),
    "linear": (drawing.BLUE, ":"),
    "cosine": (drawing.BLUE, "-"),
    "knee": (drawing.PINK, "-"),
    "plateau": (drawing.GREY, "-"),
    "GreedyLR": (drawing.RED, "-"),
    "hypergradient": (drawing.ORANGE, "-"),
    "LRTuner": (drawing.YELLOW, "-"),
    "polling": (drawing.GREEN, "-"),
    "ARC": (drawing.BROWN, "-"),
    "schedule-free": (drawing.GREY, "--"),
    "mechanic": (drawing.SKY, "--"),
    "dog-guess": (drawing.GREEN, "--"),
    "prodigy-guess": (drawing.ORANGE, "--"),
    "auto": (drawing.BLACK, "-"),
}
SCHEDULES = tuple(LOOKS)
OURS, MEASURE = "auto", "cosine"
# The settings of auto_lr were chosen on these, or changes to them were tried on these, and not made.
DEVELOPMENT = (
    "digits-mlp",
    "mnist1d-mlp",
    "mnist1d-residual",
    "digits-vit",
    "language-transformer",
    "language-lstm",
    "summarization",
    "segmentation",
)
TOLERANCE = 2.0  # points of accuracy
LOSS_TOLERANCE = 1.1  # times the held-out loss
OPTIMIZERS = ("adamw", "sgd", "adagrad")
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"tasks": DEVELOPMENT[:3], "schedules": SCHEDULES, "steps": 1000, "seeds": 5},
    # The other kinds of tasks, with the two schedules that the verdict compares.
    "full": {
        "tasks": (
            "digits-vit",
            "digits",
            "digits-resnet",
            "tagging",
            "translation-de",
            "question-answering",
        ),
        "schedules": (MEASURE, OURS),
        "steps": 1000,
        "seeds": 5,
    },
}

_EXPLANATION = (
    "Median test accuracy in percent. The best rate of each task and optimizer is that of the cosine "
    "schedule, of a grid of half decades, on seeds that are not reported. Polling takes seven more forward "
    "passes a step than the others; nothing here is corrected for that. Prodigy and schedule-free are forms "
    "of Adam, whatever the optimizer, and DoG one of SGD; to Prodigy and DoG the initial rate is that which "
    "their own estimate starts from. The search of auto_lr is among its steps. Its settings were chosen, and "
    f"others tried, on {', '.join(DEVELOPMENT)}, and on small networks outside the suite (digits with "
    "wrong labels, by sigmoids and by a GRU, an autoencoder, the next character by a perceptron, "
    "wines), and on no other task; but that its drift needs a least use, and an error in its search, "
    "were noticed on digits and on question-answering."
)


def run(job: Job) -> None:
    """Trains all runs, and leaves rows, table, figure and report; goes on where it stopped."""
    chosen = PRESETS[job.preset]
    steps, seeds = chosen["steps"], chosen["seeds"]
    described = {"preset": chosen, "factors": FACTORS, "optimizers": OPTIMIZERS}
    sweep = Sweep(job, Settings(steps), described)
    pairs = [(task, optimizer) for task in chosen["tasks"] for optimizer in OPTIMIZERS]
    tuning = [Group(*pair, make_specs(("cosine",), _grid(pair[1]), TUNING_SEEDS)) for pair in pairs]
    best = best_rates(sweep.train(tuning, keep_programs=True))
    rates = {pair: [best[pair] * factor for factor in FACTORS] for pair in pairs}
    groups = [Group(*pair, make_specs(chosen["schedules"], rates[pair], range(seeds))) for pair in pairs]
    sweep.train(groups, keep_programs=True)
    leave(job, sweep.finish(), f"Initial rates: {steps} steps, {seeds} seeds")


def leave(job: Job, runs: pl.DataFrame, title: str) -> None:
    """Prints and writes everything that follows from the rows."""
    table = summarize(runs)
    every = gaps(runs)
    _print(table, job.console)
    headers, cells = _gap_cells(every)
    print_table(job.console, _GAPS, headers, cells, left=2)
    verdict_text = verdict(every)
    job.console.print(verdict_text)
    figures = {"initial_rate": draw(table, title)}
    sections = [html.Section(_GAPS, verdict_text, [html.Table(headers, cells)])]
    if failures := [gap for gap in every if gap.worst > TOLERANCE]:
        figures["where_it_fails"] = draw_failures(runs, failures)
        reasons = explain(runs, failures)
        job.console.print(reasons)
        sections.append(html.Section("Where it fails", f"{reasons} See where_it_fails.png.", []))
    publish(
        job,
        title,
        _EXPLANATION,
        tables={"table": table, "gaps": pl.DataFrame(every)},
        figures=figures,
        sections=[*sections, *_sections(table)],
        recomputed_by="experiments.studies.initial_rate.summarize, gaps and explain",
    )


def _grid(optimizer: str) -> list[float]:
    """Half decades around the middle one of the usual rates."""
    middle = LEARNING_RATES[optimizer][1]
    return [float(middle * 10 ** (exponent / 2)) for exponent in range(-2, 5)]


def summarize(runs: pl.DataFrame) -> pl.DataFrame:
    """One row for each task, optimizer, schedule and factor.

    Args:
      runs: one row a run, as ``runs.parquet`` holds them, those of the tuning seeds among them.

    Returns:
      A frame with ``task``, ``optimizer``, ``schedule``, ``factor`` (of the best rate), the median, least
      and greatest test accuracy over the seeds, in percent, and the median test loss.
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
    """The reported runs, with their ``factor`` of the best rate and their ``accuracy`` in percent."""
    best, own = best_rates(runs), reported(runs)
    ratios = np.array([row[2] / best[row[:2]] for row in own[["task", "optimizer", "learning_rate"]].rows()])
    nearest = np.abs(np.log(ratios[:, None] / np.array(FACTORS))).argmin(axis=1)
    return own.with_columns(
        factor=pl.Series(np.array(FACTORS)[nearest]), accuracy=100 * pl.col("test_metric").cast(pl.Float64)
    )


def _median_loss(cell: pl.DataFrame) -> float:
    """That of the held-out examples; infinite where half of the runs have none."""
    losses = cell["test_loss"].cast(pl.Float64).to_numpy()
    return float(np.median(np.where(np.isfinite(losses), losses, np.inf)))


class Gap(NamedTuple):
    """How far ``auto_lr`` is below the best of cosine, on a task with an optimizer."""

    task: str
    optimizer: str
    ours: float  # factor of the initial rate at which auto_lr is worst
    measure: float  # factor at which cosine is best
    best: float  # accuracy of cosine there, percent; the median of the seeds
    worst: float  # points that the worst of auto_lr is below; negative where it is above
    loss: float  # the greatest held-out loss of auto_lr over the least of cosine
    middle: float  # points that its median over the initial rates is below, mean over seeds
    middle_low: float  # the ends of the 95% confidence interval of that, over seeds
    middle_high: float


def gaps(runs: pl.DataFrame) -> list[Gap]:
    """One for each pair of a task and an optimizer, from rows as :func:`summarize` takes them."""
    result = []
    every = _with_factors(runs)
    for (task, optimizer), table in summarize(runs).group_by(["task", "optimizer"], maintain_order=True):
        ours = table.filter(schedule=OURS).sort("accuracy")
        measure = table.filter(schedule=MEASURE).sort("accuracy")
        best = measure["factor"][-1]
        own = every.filter(task=task, optimizer=optimizer)
        median = own.filter(schedule=OURS).group_by("seed").agg(ours=pl.col("accuracy").median())
        pairs = median.join(own.filter(schedule=MEASURE, factor=best), on="seed")
        below = (pairs["accuracy"] - pairs["ours"]).to_numpy()
        result.append(
            Gap(
                task,
                optimizer,
                ours=ours["factor"][0],
                measure=best,
                best=measure["accuracy"][-1],
                worst=measure["accuracy"][-1] - ours["accuracy"][0],
                loss=_ratio(ours["test_loss"].max(), measure["test_loss"].min()),
                middle=float(below.mean()),
                **dict(zip(("middle_low", "middle_high"), confidence_interval(below), strict=True)),
            )
        )
    return result


def _ratio(loss: float, least: float) -> float:
    """How many times ``least`` a loss is, none of them negative; infinite above a loss of 0."""
    if least > 0:
        return loss / least
    return 1.0 if loss == least else float("inf")


def verdict(every: list[Gap]) -> str:
    """How often ``auto_lr`` at its worst, and in the middle, is as good as cosine at its best rate."""
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
            f"Of {len(own)} pairs of the {name}, the worst of auto_lr over the {len(FACTORS)} initial "
            f"rates is within {TOLERANCE:g} points of cosine at its best rate on {sum(near)} (largest gap "
            f"{max(gap.worst for gap in own):.1f}), its held-out loss within {LOSS_TOLERANCE - 1:.0%} of "
            f"cosine's least on {sum(near_by_loss)}, and one or the other holds on {sum(either)}; its median "
            "over the rates is not below cosine at its best rate by more than the 95% confidence interval on "
            f"{sum(not_below)} (largest mean gap {max(gap.middle for gap in own):.1f} points)."
        )
    return " ".join(sentences)


def explain(runs: pl.DataFrame, failures: list[Gap]) -> str:
    """How the rate of ``auto_lr`` went where it fails, beside that of cosine from its best initial rate."""
    every = _with_factors(runs)
    sentences = []
    for gap in failures:
        own = every.filter(task=gap.task, optimizer=gap.optimizer)
        ours, measure = (
            np.stack(own.filter(schedule=schedule, factor=factor)["rate"].to_list()).astype(float)
            for schedule, factor in ((OURS, gap.ours), (MEASURE, gap.measure))
        )
        searched = ours.shape[1] // 3  # the search is over by then
        at, highest = np.median(ours[:, searched]), np.median(ours[:, searched:].max(axis=1))
        first, there = np.median(measure.max(axis=1)), np.median(measure[:, searched])
        sentences.append(
            f"{gap.task}, {gap.optimizer}, x{gap.ours:g}: {gap.worst:.1f} points below. A third of the way "
            f"its rate is {at / there:.2g} times that of cosine, and from there on at most "
            f"{highest / first:.2g} times cosine's highest. Its held-out loss is at worst {gap.loss:.2f} "
            f"times cosine's least."
        )
    return " ".join(sentences)


_GAPS = f"{OURS} from its worst initial rate beside {MEASURE} from its best one"


def _gap_cells(every: list[Gap]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Headers and rows of the table that the verdict is of."""
    headers = (
        "task",
        "optimizer",
        f"{MEASURE}, %",
        f"{OURS}, %",
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
    """For each task and optimizer the rows of the printed table: a schedule and its accuracies."""
    result = []
    for (task, optimizer), part in table.group_by(["task", "optimizer"], maintain_order=True):
        rows = []
        for schedule in _shown(part):
            own = part.filter(pl.col("schedule") == schedule).sort("factor")["accuracy"].to_list()
            rows.append([schedule, *(f"{value:.1f}" for value in own), f"{min(own):.1f}"])
        result.append((task, optimizer, rows))
    return result


def _shown(part: pl.DataFrame) -> list[str]:
    """The schedules that there are runs of, in the order of the legend."""
    there = set(part["schedule"])
    return [schedule for schedule in LOOKS if schedule in there]


_HEADERS = ("schedule", *(f"x{factor:g}" for factor in FACTORS), "worst")


def _print(table: pl.DataFrame, console: Console) -> None:
    for task, optimizer, rows in _cells(table):
        print_table(console, f"{task}, {optimizer}: median test accuracy, %", _HEADERS, rows)


def draw(table: pl.DataFrame, title: str) -> plt.Figure:
    """Accuracy against the initial rate, a panel for each task and optimizer."""
    parts = list(table.group_by(["task", "optimizer"], maintain_order=True))
    figure, panels = drawing.panels(len(parts), len(OPTIMIZERS), sharey=True)
    for axes, ((task, optimizer), part) in zip(panels, parts, strict=True):
        for schedule in _shown(part):
            color, line = LOOKS[schedule]
            own = part.filter(pl.col("schedule") == schedule).sort("factor")
            look = {"color": color, "ls": line, "lw": 2.4 if schedule == OURS else 1.4}
            axes.plot(own["factor"], own["accuracy"], marker="o", ms=3, label=schedule, **look)
            if schedule in (OURS, MEASURE):
                axes.fill_between(
                    own["factor"], own["accuracy_low"], own["accuracy_high"], color=color, alpha=0.12, lw=0
                )
        axes.set_xscale("log")
        axes.set_title(f"{task}, {optimizer}", fontsize=10)
        axes.set_xlabel("initial rate / best rate")
        axes.set_ylabel("test accuracy, %")
    drawing.add_legend(figure, panels[0], columns=8)
    bands = f"band of {OURS} and {MEASURE}: least to greatest"
    figure.suptitle(f"{title}; line: median, {bands}", fontsize=12)
    return figure


def draw_failures(runs: pl.DataFrame, failures: list[Gap]) -> plt.Figure:
    """Loss and rate of all seeds where it fails, beside those of cosine at its best rate."""
    every = _with_factors(runs)
    figure, panels = drawing.panels(2 * len(failures), 2)
    for failure, pair in zip(failures, zip(panels[::2], panels[1::2], strict=True), strict=True):
        for schedule, factor in ((OURS, failure.ours), (MEASURE, failure.measure)):
            cell = every.filter(
                task=failure.task, optimizer=failure.optimizer, schedule=schedule, factor=factor
            )
            for number, run in enumerate(cell.iter_rows(named=True)):
                for axes, name in zip(pair, ("loss", "rate"), strict=True):
                    seen = np.array(run[name], float)
                    label = f"{schedule}, x{factor:g}" if number == 0 else None
                    percent = drawing.percent_of_steps(len(seen))
                    axes.plot(percent, seen, color=LOOKS[schedule][0], lw=1, alpha=0.7, label=label)
        for axes, name in zip(pair, ("training loss", "learning rate"), strict=True):
            axes.set_yscale("log")
            axes.set_title(
                f"{failure.task}, {failure.optimizer}: {failure.worst:.1f} points below", fontsize=10
            )
            axes.set_xlabel("% of the steps")
            axes.set_ylabel(name)
            axes.legend(fontsize=8)
    figure.suptitle("Where the worst of auto_lr is not near the best of cosine", fontsize=12)
    return figure


def _sections(table: pl.DataFrame) -> list[html.Section]:
    sections = []
    for task, optimizer, rows in _cells(table):
        part = table.filter((pl.col("task") == task) & (pl.col("optimizer") == optimizer))
        curves = []
        for schedule in _shown(part):
            color, line = LOOKS[schedule]
            own = part.filter(pl.col("schedule") == schedule).sort("factor")
            style = {"color": color, "dash": {"-": "solid", "--": "dash", ":": "dot"}[line]}
            curves.append(html.Curve(schedule, own["factor"], own["accuracy"], style))
        figure = html.line_figure(curves, "initial rate / best rate", "test accuracy, %", x_log=True)
        sections.append(html.Section(f"{task}, {optimizer}", "", [figure, html.Table(_HEADERS, rows)]))
    return sections
