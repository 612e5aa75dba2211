"""ARC against passive schedules, superconvergence, a line search and its own actions without its network, at
three initial rates.

Paper: X. Dong et al., "To Raise or Not To Raise: The Autonomous Learning Rate Question", Section 4 (Tables 2
to 4), Section 5 (failure modes) and Appendix A.5 (frequency of decisions). The paper trains CIFAR-10 with
Adam, MSCOCO with momentum and PTB with SGD. Digits, scenes of digits and source code take their place here,
with the same optimizers and initial rates a factor of ten apart, as in Tables 2 and 4. As in the paper, the
score of a run is its best held-out metric of 30, and each table cell is the median over runs.

The paper has no control for the decisions themselves: where all initial rates are too low, raising the rate
at every decision needs no network. Here the controls are always raising, always keeping (which is the
constant rate) and random actions.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import polars as pl

from experiments.arc import DECISIONS, EPOCHS
from experiments.reporting import drawing, html
from experiments.reporting.summary import confidence_interval, interval_text
from experiments.reporting.tables import print_table
from experiments.studies.base import Job, Sweep, publish, read_published
from experiments.studies.tuning import TUNING_SEEDS
from experiments.tasks import make_task
from experiments.training.engine import OPTIMIZERS, Settings, make_specs
from experiments.training.loop import batch_indices, take
from experiments.training.schedules import SCHEDULES, arc_with
from experiments.training.store import write_atomically
from experiments.training.sweep import Group
from greedylr_jax.arc import load_weights
from greedylr_jax.range_test import range_test, suggest_best

PASSIVE_SCHEDULES = ("constant", "cosine", "cyclic-cosine", "exponential")
SUPERCONVERGENCE, LINE_SEARCH = "one-cycle", "Armijo"
ALWAYS_RAISE, ALWAYS_KEEP, RANDOM_ACTION = "always-raise", "constant", "random-action"
CONTROLS = (ALWAYS_RAISE, ALWAYS_KEEP, RANDOM_ACTION)  # ARC's actions without its network
ARC, ARC_NO_VALIDATION, ARC_PUBLISHED = "ARC", "ARC, no validation", "ARC, published weights"
_MIN_DECISIONS = 10  # per run, at every interval
_RANGE_TEST_STEPS = 300


class Case(NamedTuple):
    """A table of the paper, and the task that replaces its own."""

    key: str
    paper: str
    task: str
    optimizer: str
    learning_rates: tuple[float, float, float]
    metric: str
    lower_is_better: bool = False
    own_decays: Mapping[str, str] = {}  # schedules that the paper sets differently here, by their name


CASES = {
    "image": Case(
        "image", "Table 2: CIFAR-10, accuracy", "digits", "adamw", (1e-2, 1e-3, 1e-4), "accuracy, %"
    ),
    "detection": Case(
        "detection", "Table 3: MSCOCO, mAP", "detection", "momentum", (1e-1, 1e-2, 1e-3), "AP50, %"
    ),
    "language": Case(
        "language",
        "Table 4: PTB, perplexity",
        "language-lstm",
        "sgd",
        (10.0, 1.0, 0.1),
        "perplexity",
        True,
        {"cyclic-cosine": "cyclic-cosine-text", "exponential": "exponential-text"},
    ),
}


class EvaluationSettings(NamedTuple):
    """The number of training steps and seeds."""

    steps: dict[str, int]  # by case; multiples of 30
    seeds: int
    intervals: tuple[int, ...] = (1, 2, 3, 4, 5, 6)  # epochs between two decisions, Appendix A.5


def evaluate(job: Job, settings: EvaluationSettings, weights: Path | None, published: Path | None) -> None:
    """Trains all runs; writes rows, tables, figures and report. Resumes after an interruption.

    Args:
      job: the command line's call.
      settings: training steps of each case, and number of seeds.
      weights: ARC's weights, a safetensors file; None: the weights in the package.
      published: the authors' weights, a safetensors file; None: leave them out.
    """
    arc_weights = None if weights is None else str(weights)
    variants = {
        ARC: arc_with(arc_weights, decisions=DECISIONS),
        ARC_NO_VALIDATION: arc_with(arc_weights, decisions=DECISIONS, validation=False),
    }
    if published is not None:
        variants[ARC_PUBLISHED] = arc_with(str(published), decisions=DECISIONS)
    digests = [_digest(path) for path in (weights, *([published] if published else []))]
    described = {"evaluation": settings._asdict(), "variants": variants, "digests": digests}
    sweeps, frames, range_tests = [], [], []
    for key, steps in settings.steps.items():
        sweep = _open_sweep(job, key, steps, EPOCHS, described)
        range_tests.append(run_range_test(CASES[key]))
        frames.append(_train_case(sweep, job, CASES[key], variants, settings.seeds, range_tests[-1]))
        sweeps.append(sweep)
    first, steps = next(iter(settings.steps.items()))
    for interval in settings.intervals:
        epochs = max(EPOCHS, _MIN_DECISIONS * interval)
        sweep = _open_sweep(job, f"every-{interval}", steps // EPOCHS * epochs, epochs, described)
        schedule = arc_with(arc_weights, decisions=epochs // interval)
        frames.append(_train_interval(sweep, CASES[first], schedule, interval, settings.seeds))
        sweeps.append(sweep)
    runs = pl.concat(frames)
    write_atomically(job.out / "runs.parquet", runs.write_parquet)
    for sweep in sweeps:
        sweep.finish()
    _report(job, runs, pl.concat(range_tests), settings)


def _open_sweep(job: Job, name: str, steps: int, evaluations: int, described: dict[str, Any]) -> Sweep:
    return Sweep(job.in_folder(name), Settings(steps, evaluations, validated=True), described)


def _train_case(
    sweep: Sweep, job: Job, case: Case, variants: dict[str, str], seeds: int, tested: pl.DataFrame
) -> pl.DataFrame:
    """Trains all schedules on a case from each of its initial rates; returns the rows."""
    suggested = suggested_rate(tested)
    job.console.print(f"{case.task}: the range test suggests {suggested:.3g} for superconvergence")
    specs = []
    for label, schedule in ({name: name for name in (*PASSIVE_SCHEDULES, ALWAYS_RAISE)} | variants).items():
        specs += make_specs((schedule,), case.learning_rates, range(seeds), label=label)
    for seed in range(seeds):
        drawn = f"{RANDOM_ACTION}(draw={seed})"
        specs += make_specs((drawn,), case.learning_rates, (seed,), label=RANDOM_ACTION)
    specs += make_specs((SUPERCONVERGENCE,), (suggested,), range(seeds), label=SUPERCONVERGENCE)
    # The line search chooses its steps itself, at most 1, along the gradient.
    line_search = make_specs((LINE_SEARCH,), (1.0,), range(seeds), label=LINE_SEARCH)
    specs = [each._replace(schedule=case.own_decays.get(each.schedule, each.schedule)) for each in specs]
    rows = sweep.train([Group(case.task, case.optimizer, specs), Group(case.task, "sgd", line_search)])
    return _rows_of(rows, case, None)


def _train_interval(sweep: Sweep, case: Case, schedule: str, interval: int, seeds: int) -> pl.DataFrame:
    """Trains ARC with a decision every ``interval`` epochs; returns the rows."""
    specs = make_specs((schedule,), case.learning_rates, range(seeds), label=ARC)
    return _rows_of(sweep.train([Group(case.task, case.optimizer, specs)]), case, interval)


def _rows_of(rows: pl.DataFrame, case: Case, interval: int | None) -> pl.DataFrame:
    """The rows with the case, the epochs between two decisions, and the label as the name of the schedule."""
    return rows.with_columns(
        schedule=pl.col("label"), case=pl.lit(case.key), every=pl.lit(interval, pl.Int64)
    )


def _digest(weights: Path | None) -> str:
    """A hash of the weights, so that changed weights at the same path are noticed."""
    arrays = load_weights(weights)
    content = b"".join(np.asarray(arrays[name]).tobytes() for name in sorted(arrays))
    return hashlib.sha256(content).hexdigest()[:16]


def run_range_test(case: Case) -> pl.DataFrame:
    """A learning-rate range test of 300 steps (Appendix A.3), one row per step.

    Returns:
      A frame with ``case``, ``learning_rate``, ``loss``, ``smoothed``, and ``suggested``, the rate with the
      lowest smoothed loss, equal in all rows.
    """
    task = make_task(case.task)
    init_key, batch_key = jax.random.split(jax.random.key(TUNING_SEEDS[0]))
    batches = take(task.train, batch_indices(task, _RANGE_TEST_STEPS, batch_key))
    inner = OPTIMIZERS[case.optimizer](1.0)
    test = jax.jit(
        lambda params, batches: range_test(
            task.loss, params, batches, inner=inner, min_learning_rate=1e-5, max_learning_rate=100.0
        )
    )
    result = test(task.init(init_key), batches)
    columns = {
        "learning_rate": result.learning_rates, "loss": result.losses, "smoothed": result.smoothed,
    }  # fmt: skip
    frame = pl.DataFrame({name: np.asarray(column, float) for name, column in columns.items()})
    suggested = float(suggest_best(result))
    return frame.select(pl.lit(case.key).alias("case"), *frame.columns, pl.lit(suggested).alias("suggested"))


def suggested_rate(tested: pl.DataFrame) -> float:
    """The rate that the range test of one case suggests."""
    return float(tested["suggested"][0])


def scores(runs: pl.DataFrame) -> pl.DataFrame:
    """Adds each run's best held-out metric, in percent or as a perplexity; infinite if no loss was finite.

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
    """The runs of Tables 2 to 4 with their scores, without those of Appendix A.5."""
    return scores(runs.filter(pl.col("every").is_null()))


def _from_rate(cell: pl.DataFrame, schedule: str, rate: float) -> pl.DataFrame:
    """The runs of a schedule at an initial rate; all of them if the schedule chooses its own rate."""
    chooses_rate = schedule in (SUPERCONVERGENCE, LINE_SEARCH)
    return cell if chooses_rate else cell.filter(pl.col("learning_rate") == rate)


def summarize(runs: pl.DataFrame) -> pl.DataFrame:
    """Tables 2 to 4: one row for each case and schedule.

    Returns:
      A frame with ``case``; ``schedule``; ``high``, ``middle``, ``low``: median score at each initial rate
      (the same in all three for superconvergence and the line search, which choose their own rate);
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


def against(runs: pl.DataFrame) -> pl.DataFrame:
    """ARC against its actions without its network, paired by seed: one row for each case, rate and control.

    Returns:
      A frame with ``case``; ``learning_rate`` (None: the mean over the three); ``control``; ``different``:
      percent of ARC's decisions that differ from the control's (None for random actions); ``difference``:
      mean over the seeds of ARC's score minus the control's, positive where ARC is better, with its 95%
      confidence interval. Perplexities are compared by their logarithm, those that are not finite as the
      highest finite one of the case.
    """
    rows = []
    for (key,), cell in _of_tables(runs).group_by(["case"], maintain_order=True):
        case = CASES[key]
        for control in CONTROLS:
            by_rate = [_gains(cell, case, control, rate) for rate in case.learning_rates]
            different = [_different(cell, control, rate) for rate in case.learning_rates]
            rates = (*case.learning_rates, None)
            gains = (*by_rate, np.mean(by_rate, axis=0))
            shares = (*different, None if different[0] is None else float(np.mean(different)))
            for rate, gain, share in zip(rates, gains, shares, strict=True):
                low, high = confidence_interval(gain)
                row = {"case": key, "learning_rate": rate, "control": control, "different": share}
                row |= {"difference": float(gain.mean()), "difference_low": low, "difference_high": high}
                rows.append(row)
    return pl.DataFrame(rows, infer_schema_length=None)


def _gains(cell: pl.DataFrame, case: Case, control: str, rate: float) -> np.ndarray:
    """ARC's score minus the control's from one rate, by seed, positive where ARC is better."""
    highest = cell["score"].filter(cell["score"].is_finite()).max()
    own, other = (
        np.minimum(cell.filter(schedule=name, learning_rate=rate).sort("seed")["score"].to_numpy(), highest)
        for name in (ARC, control)
    )
    return np.log(other) - np.log(own) if case.lower_is_better else own - other


def _different(cell: pl.DataFrame, control: str, rate: float) -> float | None:
    """Percent of ARC's decisions from one rate that are not the action of a control."""
    if control == RANDOM_ACTION:
        return None
    counts = _count_decisions(
        np.array(cell.filter(schedule=ARC, learning_rate=rate)["rate"].to_list(), float)
    )
    same = counts["raised" if control == ALWAYS_RAISE else "unchanged"]
    return 100 * (1 - same / DECISIONS)


class Claim(NamedTuple):
    """The claim of the paper on one case.

    Attributes:
      best_cells: number of the three initial rates at which ARC's median is not worse than that of any
        passive schedule, as in the paper's tables.
      worst_is_best: whether ARC's worst median over the three rates is better than that of every passive
        schedule.
      beats_raising: whether ARC is significantly better than always raising, over the mean of the rates.
      text: a sentence.
    """

    best_cells: int
    worst_is_best: bool
    beats_raising: bool
    text: str

    @property
    def holds(self) -> bool:
        """Whether ARC is better than the passive schedules, and not merely by raising every time."""
        return self.worst_is_best and self.beats_raising


def claim(runs: pl.DataFrame, key: str) -> Claim:
    """Compares ARC with passive schedules, cell by cell and by the worst cell, and with always raising."""
    case = CASES[key]
    rows = {row["schedule"]: row for row in summarize(runs).filter(case=key).iter_rows(named=True)}
    sign = -1 if case.lower_is_better else 1
    best_cells = sum(
        all(sign * rows[ARC][cell] >= sign * rows[name][cell] for name in PASSIVE_SCHEDULES)
        for cell in ("high", "middle", "low")
    )
    rival = max(PASSIVE_SCHEDULES, key=lambda name: sign * rows[name]["worst"])
    worst_is_best = sign * rows[ARC]["worst"] > sign * rows[rival]["worst"]
    pairs = against(runs).filter(pl.col("learning_rate").is_null(), case=key, control=ALWAYS_RAISE)
    pair = pairs.row(0, named=True)
    beats = pair["difference_low"] > 0
    loses = pair["difference_high"] < 0
    relation = "better than" if beats else "worse than" if loses else "not distinguishable from"
    unit = "log perplexity" if case.lower_is_better else "points"
    made = Claim(best_cells, bool(worst_is_best), bool(beats), "")
    return made._replace(
        text=f"{case.task}: ARC's median is the best of the passive schedules' at {best_cells} of 3 initial "
        f"rates; its worst over the rates is {rows[ARC]['worst']:.2f}, that of the best passive schedule "
        f"({rival}) {rows[rival]['worst']:.2f}, that of always raising {rows[ALWAYS_RAISE]['worst']:.2f} "
        f"({case.metric}). ARC is {relation} always raising ({unit}: {interval_text(pair, '+.2f')}), with "
        f"{pair['different']:.0f}% other decisions: the paper's claim "
        f"{'holds' if made.holds else 'does not hold'}."
    )


def by_frequency(runs: pl.DataFrame) -> pl.DataFrame:
    """Appendix A.5: one row for each number of epochs between two decisions.

    Returns:
      A frame with ``every``; ``median``, ``minimum`` and ``maximum`` score over all runs and initial rates.
    """
    scored = scores(runs.filter(pl.col("every").is_not_null()))
    return (
        scored.group_by("every")
        .agg(median=pl.col("score").median(), minimum=pl.col("score").min(), maximum=pl.col("score").max())
        .sort("every")
    )


def decisions(runs: pl.DataFrame) -> pl.DataFrame:
    """Section 5: ARC's decisions, one row for each case and initial rate.

    Returns:
      A frame with ``case``; ``learning_rate``; ``raised``, ``unchanged``, ``lowered``: mean number of
      decisions per run; ``final_rate``: median final rate; ``turned_up``: fraction of runs whose rate fell
      and then rose from its minimum (Figure 6c); ``failed``: fraction of runs with a worse score than every
      run with the constant rate (Figure 6a).
    """
    scored = _of_tables(runs)
    rows = []
    for (key, rate), cell in scored.filter(pl.col("schedule") == ARC).group_by(
        ["case", "learning_rate"], maintain_order=True
    ):
        constant = scored.filter(
            (pl.col("case") == key) & (pl.col("schedule") == "constant") & (pl.col("learning_rate") == rate)
        )["score"]
        is_worse = (
            cell["score"] > constant.max() if CASES[key].lower_is_better else cell["score"] < constant.min()
        )
        counts = _count_decisions(np.array(cell["rate"].to_list(), float))
        rows.append({"case": key, "learning_rate": rate} | counts | {"failed": float(is_worse.mean())})
    return pl.DataFrame(rows)


def _count_decisions(rates: np.ndarray) -> dict[str, float]:
    """Decisions inferred from the rates of runs, shape (runs, steps); see :func:`decisions`."""
    ratios = rates[:, 1:] / rates[:, :-1]
    raised, lowered = (ratios > 1.3).sum(axis=1), (ratios < 0.8).sum(axis=1)
    lowest = rates.min(axis=1)
    turned_up = (rates[:, -1] > 1.3 * lowest) & (lowest < 0.8 * rates[:, 0])
    return {
        "raised": float(raised.mean()),
        "unchanged": float((DECISIONS - raised - lowered).mean()),
        "lowered": float(lowered.mean()),
        "final_rate": float(np.median(rates[:, -1])),
        "turned_up": float(turned_up.mean()),
    }


def published_tables() -> pl.DataFrame:
    """The paper's Tables 2 to 4, in the format of :func:`summarize` without ``worst``."""
    return read_published("arc_tables")


_REGISTERED = (*PASSIVE_SCHEDULES, ALWAYS_RAISE, RANDOM_ACTION, SUPERCONVERGENCE, LINE_SEARCH, ARC)
_LOOKS = {name: SCHEDULES[name].look for name in _REGISTERED} | {
    ARC_NO_VALIDATION: drawing.Look(drawing.ORANGE),
    ARC_PUBLISHED: drawing.Look(drawing.VIOLET),
}
_COLORS = {name: look.color for name, look in _LOOKS.items()}


def _report(job: Job, runs: pl.DataFrame, tested: pl.DataFrame, settings: EvaluationSettings) -> None:
    """Prints the tables and writes the report."""
    table, frequency, decided, compared = (
        function(runs) for function in (summarize, by_frequency, decisions, against)
    )
    for key in settings.steps:
        own = table.filter(pl.col("case") == key)
        print_table(job.console, f"{CASES[key].task}: {CASES[key].metric}", _headers(key), _cells(own))
        job.console.print(claim(runs, key).text)
    print_table(job.console, "ARC without its network", _CONTROL_HEADERS, _control_rows(compared), left=3)
    print_table(job.console, "Epochs between two decisions", _FREQUENCY_HEADERS, _rows(frequency))
    print_table(job.console, "ARC's decisions", _DECISION_HEADERS, _rows(decided), left=1)
    steps = ", ".join(f"{CASES[key].task} {steps} steps" for key, steps in settings.steps.items())
    publish(
        job,
        "ARC at three initial rates",
        f"{steps}; {settings.seeds} seeds; medians of each run's best of {EPOCHS} held-out metrics. Half of "
        "the held-out examples give ARC's validation losses; all metrics are of the other half.",
        tables={
            "table": table,
            "frequency": frequency,
            "decisions": decided,
            "against": compared,
            "range_test": tested,
        },
        figures={
            "histories": draw_histories(runs),
            "runs": draw_runs(runs),
            "failures": draw_failures(runs),
            "frequency": draw_frequency(runs),
            "range_test": draw_range_test(tested),
        },
        sections=_sections(runs, table, frequency, decided, compared),
        recomputed_by="experiments.arc.evaluate.summarize, against, by_frequency and decisions",
    )


_CONTROL_HEADERS = ("case", "initial rate", "control", "other decisions, %", "ARC minus control [95% CI]")


def _control_rows(compared: pl.DataFrame) -> list[list[str]]:
    return [
        [
            row["case"],
            "all" if row["learning_rate"] is None else f"{row['learning_rate']:g}",
            _name(row["control"]),
            "" if row["different"] is None else f"{row['different']:.0f}",
            interval_text(row, "+.2f"),
        ]
        for row in compared.iter_rows(named=True)
    ]


def _name(schedule: str) -> str:
    """The name of a schedule in tables: the constant rate is also what always keeping it gives."""
    return "constant (always-keep)" if schedule == ALWAYS_KEEP else schedule


def _headers(key: str) -> tuple[str, ...]:
    return "schedule", *(f"from {rate:g}" for rate in CASES[key].learning_rates), "worst"


def _cells(table: pl.DataFrame) -> list[list[str]]:
    columns = table.select("schedule", "high", "middle", "low", "worst")
    return [[_name(row[0]), *(f"{value:.2f}" for value in row[1:])] for row in columns.iter_rows()]


_FREQUENCY_HEADERS = ("epochs", "median", "minimum", "maximum")
_DECISION_HEADERS = (
    "case",
    "initial rate",
    "raised",
    "unchanged",
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
    """The run with the median score."""
    ordered = cell.sort("score", descending=case.lower_is_better)
    return ordered.row(len(ordered) // 2, named=True)


def _shown_metric(run: dict[str, Any], case: Case) -> np.ndarray:
    if case.lower_is_better:
        with np.errstate(over="ignore"):
            return np.exp(np.array(run["test_losses"], float))
    return 100 * np.array(run["test_metrics"], float)


class _Cell(NamedTuple):
    """The runs of each schedule on a case at one initial rate."""

    case: Case
    rate: float
    runs: dict[str, pl.DataFrame]


def _cells_of(runs: pl.DataFrame) -> list[_Cell]:
    """The cells of Tables 2 to 4, three per case."""
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
            style = _LOOKS[schedule].matplotlib() | {"lw": 2 if schedule == ARC else 1, "label": schedule}
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


def draw_failures(runs: pl.DataFrame) -> plt.Figure:
    """Figures 6 and 13: every run of ARC from the rate at which it fails most often, the worst in orange."""
    decided, cells = decisions(runs), {(cell.case.key, cell.rate): cell for cell in _cells_of(runs)}
    keys = decided["case"].unique(maintain_order=True).to_list()
    figure, panels = drawing.panels(2 * len(keys), 2, width=5.0, height=3.0)
    for key, metric, rates in zip(keys, panels[::2], panels[1::2], strict=True):
        own = decided.filter(pl.col("case") == key).sort("failed", descending=True, maintain_order=True)
        cell = cells[key, own["learning_rate"][0]]
        worst_last = cell.runs[ARC].sort("score", descending=not cell.case.lower_is_better)
        for number, run in enumerate(worst_last.iter_rows(named=True), 1):
            is_worst = number == len(worst_last)
            style = {"color": drawing.ORANGE if is_worst else drawing.GREY, "lw": 1.8 if is_worst else 1}
            label = f"seed {run['seed']}" + (", the worst" if is_worst else "")
            metric.plot(*_over_steps(_shown_metric(run, cell.case)), **style, label=label)
            rates.plot(*_over_steps(np.array(run["rate"], float)), **style)
        failed = own["failed"][0]
        metric.set_title(f"{cell.case.task}, from {cell.rate:g}: {cell.case.metric}", fontsize=9)
        rates.set_title(f"learning rate; {failed:.0%} below every constant rate", fontsize=9)
        rates.set_yscale("log")
        if cell.case.lower_is_better:
            metric.set_yscale("log")
        metric.legend(fontsize=7, frameon=False)
    figure.suptitle("ARC's runs where they fail most often, over the steps (%)")
    return figure


def _over_steps(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Percent of the steps, and the values."""
    return drawing.percent_of_steps(len(values)), values


def draw_range_test(tested: pl.DataFrame) -> plt.Figure:
    """Figure 9: the loss of each range test over the learning rate, and the rate that it suggests."""
    cells = list(tested.group_by(["case"], maintain_order=True))
    figure, panels = drawing.panels(len(cells), 3)
    for ((key,), cell), axes in zip(cells, panels, strict=True):
        finite = cell.filter(pl.col("smoothed").is_finite())
        axes.plot(cell["learning_rate"], cell["loss"], color=drawing.GREY, lw=0.6, label="loss of the batch")
        axes.plot(finite["learning_rate"], finite["smoothed"], color=drawing.BLUE, label="smoothed")
        axes.axvline(suggested_rate(cell), color=drawing.RED, ls="--", label=f"{suggested_rate(cell):.2g}")
        axes.set_xscale("log")
        lowest, first = float(finite["smoothed"].min()), float(finite["smoothed"][0])
        axes.set_ylim(lowest - 0.2 * (first - lowest), first + (first - lowest))
        axes.set_title(f"{CASES[key].task}, {CASES[key].optimizer}", fontsize=10)
        axes.set_xlabel("learning rate")
        axes.legend(fontsize=8, frameon=False)
    panels[0].set_ylabel("loss")
    figure.suptitle(f"Range tests of {_RANGE_TEST_STEPS} steps")
    return figure


def draw_frequency(runs: pl.DataFrame) -> plt.Figure:
    """Figure 14: scores by the number of epochs between two decisions."""
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
    runs: pl.DataFrame,
    table: pl.DataFrame,
    frequency: pl.DataFrame,
    decided: pl.DataFrame,
    compared: pl.DataFrame,
) -> list[html.Section]:
    """The sections of the report: one per case, then the controls, frequency and decisions."""
    cells = _cells_of(runs)
    sections = [
        _case_section(CASES[key], runs, table, [cell for cell in cells if cell.case.key == key])
        for key in table["case"].unique(maintain_order=True)
    ]
    sections.append(
        html.Section(
            "ARC without its network",
            "The same actions, always or at random, paired by seed. Positive: ARC is better, in points or in "
            "log perplexity.",
            [html.Table(_CONTROL_HEADERS, _control_rows(compared))],
        )
    )
    sections.append(
        html.Section(
            "Frequency of decisions",
            "Appendix A.5: in the paper, deciding more often than once in three epochs reduces the accuracy.",
            [html.Table(_FREQUENCY_HEADERS, _rows(frequency))],
        )
    )
    sections.append(
        html.Section(
            "ARC's decisions",
            "Section 5. Mean number of decisions per run; turned up: fraction of runs whose rate fell and "
            "then rose again (Figure 6c); failed: fraction of runs with a worse score than every run with a "
            "constant rate (Figure 6a).",
            [html.Table(_DECISION_HEADERS, _rows(decided))],
        )
    )
    return sections


def _case_section(case: Case, runs: pl.DataFrame, table: pl.DataFrame, cells: list[_Cell]) -> html.Section:
    """A case: our table, the paper's table, and curves of the median runs at each initial rate."""
    published = published_tables().filter(pl.col("case") == case.key).drop("case")
    parts: list[Any] = [
        html.Table(_headers(case.key), _cells(table.filter(pl.col("case") == case.key))),
        html.Table(("paper: " + case.paper, "high", "middle", "low"), _rows(published)),
    ]
    for _, rate, by_schedule in cells:
        for name in ("metric", "rate"):
            curves = []
            for schedule, cell in by_schedule.items():
                run = _median_run(cell, case)
                shown = _shown_metric(run, case) if name == "metric" else np.array(run["rate"], float)
                steps = drawing.percent_of_steps(len(shown))
                curves.append(html.Curve(schedule, steps, shown, _LOOKS[schedule].plotly()))
            title = f"{case.metric if name == 'metric' else 'learning rate'}, from {rate:g}"
            is_log = name == "rate" or case.lower_is_better
            parts.append(html.line_figure(curves, "steps, %", title, y_log=is_log))
    return html.Section(f"{case.task} ({case.paper})", claim(runs, case.key).text, parts)
