"""ARC against passive schedules, superconvergence and a line search, at three initial rates.

Paper: X. Dong et al., "To Raise or Not To Raise: The Autonomous Learning Rate Question", Section 4 (Tables 2
to 4), Section 5 (failure modes) and Appendix A.5 (how often it is asked). The paper trains CIFAR-10 with
Adam, MSCOCO with momentum and PTB with SGD; here stand for them the digits, scenes of digits and source code,
with the same optimizers, and rates a decade apart, as in its first and last table. As in the paper a run
counts with its best held-out metric, of thirty, and a cell is the median of the runs.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import polars as pl

from experiments.arc import DECISIONS, EPOCHS
from experiments.reporting import drawing, html
from experiments.reporting.tables import print_table
from experiments.studies.base import Job, Sweep, publish
from experiments.studies.tuning import TUNING_SEEDS
from experiments.tasks import make_task
from experiments.training.engine import OPTIMIZERS, Settings, batch_indices, make_specs, take
from experiments.training.schedules import arc_with
from experiments.training.store import write_atomically
from experiments.training.sweep import Group
from greedylr_jax.arc import load_weights
from greedylr_jax.range_test import range_test, suggest_best

PASSIVE = ("constant", "cosine", "cyclic-cosine", "exponential")
SUPERCONVERGENCE, LINE_SEARCH = "one-cycle", "Armijo"
OURS, BLIND, PUBLISHED = "ARC", "ARC, no validation", "ARC, published weights"
EVERY = (1, 2, 3, 4, 5, 6)  # epochs between two decisions
_TEST_STEPS = 300


class Case(NamedTuple):
    """A table of the paper, and what stands for it here."""

    key: str
    paper: str
    task: str
    optimizer: str
    learning_rates: tuple[float, float, float]
    metric: str
    lower_is_better: bool = False


CASES = {
    "image": Case(
        "image", "Table 2: CIFAR-10, accuracy", "digits", "adamw", (1e-2, 1e-3, 1e-4), "accuracy, %"
    ),
    "detection": Case(
        "detection", "Table 3: MSCOCO, mAP", "detection", "momentum", (1e-1, 1e-2, 1e-3), "AP50, %"
    ),
    "language": Case(
        "language", "Table 4: PTB, perplexity", "language-lstm", "sgd", (10.0, 1.0, 0.1), "perplexity", True
    ),
}


class Sizes(NamedTuple):
    """What is trained."""

    steps: dict[str, int]  # by case; multiples of 30
    seeds: int


def evaluate(job: Job, sizes: Sizes, weights: Path | None, published: Path | None) -> None:
    """Trains all runs, and leaves rows, tables, figures and report; goes on where it stopped.

    Args:
      job: the call from the command line.
      sizes: steps of each case, and seeds.
      weights: of ARC, a safetensors file; None: those that ship.
      published: the authors' weights as a safetensors file; None: leave them out.
    """
    ours = None if weights is None else str(weights)
    variants = {
        OURS: arc_with(ours, decisions=DECISIONS),
        BLIND: arc_with(ours, decisions=DECISIONS, validation=False),
    }
    if published is not None:
        variants[PUBLISHED] = arc_with(str(published), decisions=DECISIONS)
    names = {schedule: name for name, schedule in variants.items()}
    digests = [_digest(path) for path in (weights, *([published] if published else []))]
    described = {"sizes": sizes._asdict(), "variants": variants, "digests": digests}
    frames, sweeps = [], []
    for key, steps in sizes.steps.items():
        case = CASES[key]
        sweep = _sweep(job, key, steps, described)
        sweeps.append(sweep)
        greatest = greatest_rate(case)
        job.console.print(f"{case.task}: the range test suggests {greatest:.3g} for superconvergence")
        seeds = range(sizes.seeds)
        specs = make_specs((*PASSIVE, *variants.values()), case.learning_rates, seeds)
        specs += make_specs((SUPERCONVERGENCE,), (greatest,), seeds)
        groups = [
            Group(case.task, case.optimizer, specs),
            # The line search finds its steps itself, from 1 down, along the gradient.
            Group(case.task, "sgd", make_specs((LINE_SEARCH,), (1.0,), seeds)),
        ]
        rows = sweep.train(groups).with_columns(pl.col("schedule").replace(names), case=pl.lit(key))
        frames.append(rows.with_columns(every=pl.lit(None, pl.Int64)))
    first, steps = next(iter(sizes.steps.items()))
    for every in EVERY:
        # As in the paper: at least ten decisions.
        epochs = max(EPOCHS, 10 * every)
        sweep = _sweep(job, f"every-{every}", steps // EPOCHS * epochs, described, epochs)
        sweeps.append(sweep)
        case = CASES[first]
        schedule = arc_with(ours, decisions=epochs // every)
        specs = make_specs((schedule,), case.learning_rates, range(sizes.seeds))
        rows = sweep.train([Group(case.task, case.optimizer, specs)])
        rows = rows.with_columns(schedule=pl.lit(OURS), case=pl.lit(first), every=pl.lit(every, pl.Int64))
        frames.append(rows)
    runs = pl.concat(frames)
    write_atomically(job.out / "runs.parquet", runs.write_parquet)
    for sweep in sweeps:
        sweep.finish()
    _report(job, runs, sizes)


def _digest(weights: Path | None) -> str:
    """Tells weights from others that lie at the same place."""
    arrays = load_weights(weights)
    content = b"".join(np.asarray(arrays[name]).tobytes() for name in sorted(arrays))
    return hashlib.sha256(content).hexdigest()[:16]


def _sweep(job: Job, name: str, steps: int, described: dict[str, Any], epochs: int = EPOCHS) -> Sweep:
    return Sweep(job._replace(out=job.out / name), Settings(steps, epochs, validated=True), described)


def greatest_rate(case: Case) -> float:
    """The rate at which a range test of 300 steps sees the least loss (Appendix A.3)."""
    task = make_task(case.task)
    init_key, batch_key = jax.random.split(jax.random.key(TUNING_SEEDS[0]))
    batches = take(task.train, batch_indices(task, _TEST_STEPS, batch_key))
    inner = OPTIMIZERS[case.optimizer](1.0)
    test = jax.jit(
        lambda params, batches: range_test(
            task.loss, params, batches, inner=inner, min_learning_rate=1e-5, max_learning_rate=100.0
        )
    )
    return float(suggest_best(test(task.init(init_key), batches)))


def scores(runs: pl.DataFrame) -> pl.DataFrame:
    """Each run's best held-out metric, in the units of its table; infinite where no perplexity is finite.

    Returns:
      The rows of ``runs`` with a column ``score``.
    """
    values = []
    for key, losses, metrics in runs.select("case", "test_losses", "test_metrics").iter_rows():
        if CASES[key].lower_is_better:
            finite = [loss for loss in losses if loss is not None and np.isfinite(loss)]
            values.append(float(np.exp(min(finite))) if finite else np.inf)
        else:
            values.append(100 * float(np.max(metrics)))
    return runs.with_columns(pl.Series("score", values, pl.Float64))


def _of_tables(runs: pl.DataFrame) -> pl.DataFrame:
    """The runs of Tables 2 to 4 with their scores, those of Appendix A.5 left out."""
    return scores(runs.filter(pl.col("every").is_null()))


def _from_rate(cell: pl.DataFrame, schedule: str, rate: float) -> pl.DataFrame:
    """The runs of a schedule from a rate; those that choose their own are in every cell."""
    chooses = schedule in (SUPERCONVERGENCE, LINE_SEARCH)
    return cell if chooses else cell.filter(pl.col("learning_rate") == rate)


def summarize(runs: pl.DataFrame) -> pl.DataFrame:
    """Tables 2 to 4: one row for each case and schedule.

    Returns:
      A frame with ``case``, ``schedule``; ``high``, ``middle``, ``low``: the median score from each initial
      rate (that of superconvergence and of the line search, which choose their own, in all three);
      ``worst``: the worst of the three.
    """
    rows = []
    for (key, schedule), cell in _of_tables(runs).group_by(["case", "schedule"], maintain_order=True):
        case = CASES[key]
        by_rate = [float(_from_rate(cell, schedule, rate)["score"].median()) for rate in case.learning_rates]
        worst = max(by_rate) if case.lower_is_better else min(by_rate)
        row = {"case": key, "schedule": schedule}
        rows.append(row | dict(zip(("high", "middle", "low"), by_rate, strict=True)) | {"worst": worst})
    return pl.DataFrame(rows)


def claim(table: pl.DataFrame, key: str) -> tuple[bool, str]:
    """Whether ARC's worst median over the three rates beats that of every passive schedule, and in words."""
    case = CASES[key]
    worst = dict(table.filter(pl.col("case") == key).select("schedule", "worst").iter_rows())
    ours = worst[OURS]
    best = (min if case.lower_is_better else max)(PASSIVE, key=worst.__getitem__)
    holds = ours < worst[best] if case.lower_is_better else ours > worst[best]
    return holds, (
        f"{case.task}: ARC's worst median over the three rates is {ours:.2f}, that of the best passive "
        f"schedule ({best}) {worst[best]:.2f} ({case.metric}): the paper's claim "
        f"{'holds' if holds else 'does not hold'}."
    )


def by_frequency(runs: pl.DataFrame) -> pl.DataFrame:
    """Appendix A.5: one row for each number of epochs between two decisions.

    Returns:
      A frame with ``every``; ``median``, ``least`` and ``greatest`` score of all runs, whatever their rate.
    """
    scored = scores(runs.filter(pl.col("every").is_not_null()))
    return (
        scored.group_by("every")
        .agg(median=pl.col("score").median(), least=pl.col("score").min(), greatest=pl.col("score").max())
        .sort("every")
    )


def decisions(runs: pl.DataFrame) -> pl.DataFrame:
    """Section 5: what ARC did, one row for each case and initial rate.

    Returns:
      A frame with ``case``, ``learning_rate``; ``raised``, ``kept``, ``lowered``: decisions a run, the mean;
      ``final_rate``: the median; ``turned_up``: the share of runs whose rate rose from its lowest point to
      the end (Figure 6c); ``failed``: the share of runs that are worse than every run with the constant
      rate from there (Figure 6a).
    """
    rows = []
    scored = _of_tables(runs)
    for (key, rate), cell in scored.filter(pl.col("schedule") == OURS).group_by(
        ["case", "learning_rate"], maintain_order=True
    ):
        case = CASES[key]
        constant = scored.filter(
            (pl.col("case") == key) & (pl.col("schedule") == "constant") & (pl.col("learning_rate") == rate)
        )["score"]
        failed = cell["score"] > constant.max() if case.lower_is_better else cell["score"] < constant.min()
        histories = np.array(cell["rate"].to_list(), float)
        ratios = histories[:, 1:] / histories[:, :-1]
        raised, lowered = (ratios > 1.3).sum(axis=1), (ratios < 0.8).sum(axis=1)
        lowest = histories.min(axis=1)
        rows.append(
            {
                "case": key,
                "learning_rate": rate,
                "raised": float(raised.mean()),
                "kept": float((DECISIONS - raised - lowered).mean()),
                "lowered": float(lowered.mean()),
                "final_rate": float(np.median(histories[:, -1])),
                "turned_up": float(
                    ((histories[:, -1] > 1.3 * lowest) & (lowest < 0.8 * histories[:, 0])).mean()
                ),
                "failed": float(failed.mean()),
            }
        )
    return pl.DataFrame(rows)


def printed() -> pl.DataFrame:
    """The paper's Tables 2 to 4, in the form of :func:`summarize` without ``worst``; percent, perplexity."""
    path = Path(__file__).parents[1] / "studies" / "published" / "arc_tables.csv"
    return pl.read_csv(path)


_COLORS = dict(
    zip(
        (*PASSIVE, SUPERCONVERGENCE, LINE_SEARCH, OURS, BLIND, PUBLISHED),
        (
            drawing.SKY,
            drawing.BLUE,
            drawing.GREEN,
            drawing.GREY,
            drawing.PINK,
            drawing.BLACK,
            drawing.RED,
            drawing.ORANGE,
            drawing.YELLOW,
        ),
        strict=True,
    )
)


def _report(job: Job, runs: pl.DataFrame, sizes: Sizes) -> None:
    table, frequency, taken = summarize(runs), by_frequency(runs), decisions(runs)
    for key in sizes.steps:
        own = table.filter(pl.col("case") == key)
        print_table(job.console, f"{CASES[key].task}: {CASES[key].metric}", _headers(key), _cells(own))
        job.console.print(claim(table, key)[1])
    print_table(job.console, "Epochs between two decisions", _FREQUENCY_HEADERS, _rows(frequency))
    print_table(job.console, "What ARC did", _DECISION_HEADERS, _rows(taken), left=1)
    steps = ", ".join(f"{CASES[key].task} {steps} steps" for key, steps in sizes.steps.items())
    publish(
        job,
        "ARC at three initial rates",
        f"{steps}; {sizes.seeds} seeds; medians of each run's best of {EPOCHS} held-out metrics. Every other "
        "held-out example was ARC's validation; what is reported is of the rest, for all schedules.",
        tables={"table": table, "frequency": frequency, "decisions": taken},
        figures={
            "histories": draw_histories(runs),
            "runs": draw_runs(runs),
            "frequency": draw_frequency(runs),
        },
        sections=_sections(runs, table, frequency, taken),
        recomputed_by="experiments.arc.evaluate.summarize, by_frequency and decisions",
    )


def _headers(key: str) -> tuple[str, ...]:
    return "schedule", *(f"from {rate:g}" for rate in CASES[key].learning_rates), "worst"


def _cells(table: pl.DataFrame) -> list[list[str]]:
    columns = table.select("schedule", "high", "middle", "low", "worst")
    return [[row[0], *(f"{value:.2f}" for value in row[1:])] for row in columns.iter_rows()]


_FREQUENCY_HEADERS = ("epochs", "median", "least", "greatest")
_DECISION_HEADERS = (
    "case",
    "initial rate",
    "raised",
    "kept",
    "lowered",
    "final rate",
    "turned up",
    "failed",
)


def _rows(table: pl.DataFrame) -> list[list[str]]:
    return [
        [value if isinstance(value, str) else f"{value:.4g}" for value in row] for row in table.iter_rows()
    ]


def _median_run(cell: pl.DataFrame, case: Case) -> dict[str, Any]:
    """The run whose score is the median one."""
    ordered = cell.sort("score", descending=case.lower_is_better)
    return ordered.row(len(ordered) // 2, named=True)


def _shown_metric(run: dict[str, Any], case: Case) -> np.ndarray:
    if case.lower_is_better:
        with np.errstate(over="ignore"):
            return np.exp(np.array(run["test_losses"], float))
    return 100 * np.array(run["test_metrics"], float)


class _Cell(NamedTuple):
    """A case from one initial rate: the runs of each schedule."""

    case: Case
    rate: float
    runs: dict[str, pl.DataFrame]


def _cells_of(runs: pl.DataFrame) -> list[_Cell]:
    """The cells of Tables 2 to 4, three for each case."""
    cells = []
    for (key,), own in _of_tables(runs).group_by(["case"], maintain_order=True):
        schedules = {name: cell for (name,), cell in own.group_by(["schedule"], maintain_order=True)}
        for rate in CASES[key].learning_rates:
            from_rate = {name: _from_rate(cell, name, rate) for name, cell in schedules.items()}
            cells.append(_Cell(CASES[key], rate, from_rate))
    return cells


def draw_histories(runs: pl.DataFrame) -> plt.Figure:
    """Figures 3 to 5: metric and rate of the median run of each schedule."""
    cells = _cells_of(runs)
    figure, panels = drawing.panels(2 * len(cells), 6, width=3.4, height=2.9)
    for (case, rate, by_schedule), metric, rates in zip(cells, panels[::2], panels[1::2], strict=True):
        for schedule, cell in by_schedule.items():
            run = _median_run(cell, case)
            style = {"color": _COLORS[schedule], "lw": 2 if schedule == OURS else 1, "label": schedule}
            for axes, shown in ((metric, _shown_metric(run, case)), (rates, np.array(run["rate"], float))):
                axes.plot(drawing.percent_of_steps(len(shown)), shown, **style)
        metric.set_title(f"{case.task}, from {rate:g}: {case.metric}", fontsize=9)
        rates.set_title("learning rate", fontsize=9)
        rates.set_yscale("log")
        rates.set_ylim(min(case.learning_rates) / 30, max(case.learning_rates) * 30)
        if case.lower_is_better:
            metric.set_yscale("log")
    drawing.add_legend(figure, panels[0], columns=5)
    figure.suptitle("Median runs over the steps (%)")
    return figure


def draw_runs(runs: pl.DataFrame) -> plt.Figure:
    """Figures 10 to 12: the score of every run."""
    cells = _cells_of(runs)
    figure, panels = drawing.panels(len(cells), 3, width=4.6, height=3.6)
    for (case, rate, by_schedule), axes in zip(cells, panels, strict=True):
        boxes = {name: cell["score"].to_list() for name, cell in by_schedule.items()}
        drawing.draw_boxes(axes, boxes, _COLORS)
        axes.set_title(f"{case.task}, from {rate:g}", fontsize=10)
        axes.set_ylabel(case.metric)
        if case.lower_is_better:
            axes.set_yscale("log")
    figure.suptitle("Best held-out metric of each run")
    return figure


def draw_frequency(runs: pl.DataFrame) -> plt.Figure:
    """Figure 14: scores by how often ARC is asked."""
    scored = scores(runs.filter(pl.col("every").is_not_null()))
    figure, (axes,) = drawing.panels(1, 1, width=5.5)
    boxes = {
        str(every): scored.filter(pl.col("every") == every)["score"].to_list()
        for every in sorted(scored["every"].unique())
    }
    drawing.draw_boxes(axes, boxes, _COLORS)
    axes.set_xlabel("epochs between two decisions")
    axes.set_ylabel("best held-out metric, three initial rates")
    return figure


def _sections(
    runs: pl.DataFrame, table: pl.DataFrame, frequency: pl.DataFrame, taken: pl.DataFrame
) -> list[html.Section]:
    cells, theirs = _cells_of(runs), printed()
    sections = []
    for key in table["case"].unique(maintain_order=True):
        case = CASES[key]
        parts: list[Any] = [html.Table(_headers(key), _cells(table.filter(pl.col("case") == key)))]
        published = theirs.filter(pl.col("case") == key)
        parts.append(
            html.Table(("paper: " + case.paper, "high", "middle", "low"), _rows(published.drop("case")))
        )
        for _, rate, by_schedule in (cell for cell in cells if cell.case is case):
            for name in ("metric", "rate"):
                curves = []
                for schedule, cell in by_schedule.items():
                    run = _median_run(cell, case)
                    shown = _shown_metric(run, case) if name == "metric" else np.array(run["rate"], float)
                    steps = drawing.percent_of_steps(len(shown))
                    curves.append(html.Curve(schedule, steps, shown, {"color": _COLORS[schedule]}))
                title = f"{case.metric if name == 'metric' else 'learning rate'}, from {rate:g}"
                is_log = name == "rate" or case.lower_is_better
                parts.append(html.line_figure(curves, "steps, %", title, y_log=is_log))
        sections.append(html.Section(f"{case.task} ({case.paper})", claim(table, key)[1], parts))
    sections.append(
        html.Section(
            "How often ARC is asked",
            "Appendix A.5: the paper finds that once in three epochs is as often as does no harm.",
            [html.Table(_FREQUENCY_HEADERS, _rows(frequency))],
        )
    )
    sections.append(
        html.Section(
            "What ARC did",
            "Section 5. Decisions a run; turned up: share of the runs whose rate rose again from a low, as "
            "in figure 6c; failed: share that is worse than every run with a constant rate, as in figure 6a.",
            [html.Table(_DECISION_HEADERS, _rows(taken))],
        )
    )
    return sections
