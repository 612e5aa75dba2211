"""Figures 8 to 10 of "Zeroth Order GreedyLR": one network trained with SGD at a constant learning rate, with
GreedyLR, and with hypergradient descent per parameter and per parameter group.

The paper states neither its network nor its hyper learning rate. This study uses the digits network with each
layer as a group, and for each method the hyper learning rate of a grid with the lowest training loss on seeds
that are not reported. The report says where that rate lies at the edge of the grid.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import polars as pl

import greedylr_jax
from experiments.progress import make_progress
from experiments.reporting import drawing, html
from experiments.reporting.palette import Look
from experiments.reporting.summary import confidence_interval, interval_text, stage_losses
from experiments.reporting.tables import print_table
from experiments.studies.base import Job, publish
from experiments.tasks import make_task
from experiments.tasks.base import Task
from experiments.training import loop
from experiments.training.engine import OPTIMIZERS
from experiments.training.store import write_atomically

INITIAL_RATES = (0.01, 0.1)
HYPER_RATES = tuple(10.0**exponent for exponent in range(-8, 4))
TUNING_SEEDS = (1000, 1001)
_GROUP_COLORS = (drawing.RED, drawing.GREEN, drawing.ORANGE, drawing.PINK, drawing.SKY, drawing.BLACK)
_LINES = ("-", "--", ":", "-.")
_WIDTH = 20  # steps, of the running mean in the figures
PRESETS = {"quick": {"steps": 300, "seeds": 3}, "full": {"steps": 1200, "seeds": 10}}


class Method(NamedTuple):
    """A way to set the learning rate of SGD.

    Attributes:
      make: the optimizer with learning rate 1, initial and hyper learning rate -> the optimizer.
      look: in figures; the colours are those of the paper's figure 8.
      has_hyper_rate: whether it depends on the hyper learning rate.
      read: optimizer state and initial rate -> the learning rates to record.
    """

    make: Callable[[optax.GradientTransformation, jax.Array, jax.Array], optax.GradientTransformation]
    look: Look
    has_hyper_rate: bool
    read: Callable[[optax.OptState, jax.Array], dict[str, jax.Array]]


def _layers(params: optax.Params) -> Any:
    """The layer of each array, its parameter group."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[:1], simple=True) or "all", params
    )


def _hypergradient(granularity: str, look: Look) -> Method:
    def make(
        optimizer: optax.GradientTransformation, rate: jax.Array, hyper_rate: jax.Array
    ) -> optax.GradientTransformation:
        labels = _layers if granularity == "group" else None
        return greedylr_jax.hypergradient(
            optimizer, rate, hyper_rate, granularity=granularity, param_labels=labels
        )

    def read(state: optax.OptState, rate: jax.Array) -> dict[str, jax.Array]:
        del rate
        return {name: value for name, value in greedylr_jax.metrics(state).items() if "learning_rate" in name}

    return Method(make, look, True, read)


CONSTANT = "constant"
METHODS: dict[str, Method] = {
    CONSTANT: Method(
        lambda optimizer, rate, hyper_rate: optax.chain(optimizer, optax.scale(rate)),
        Look(drawing.RED),
        False,
        lambda state, rate: {"learning_rate": rate},
    ),
    "GreedyLR": Method(
        lambda optimizer, rate, hyper_rate: optax.chain(
            optimizer, optax.scale(rate), greedylr_jax.greedy_lr()
        ),
        Look(drawing.BLACK),
        False,
        lambda state, rate: {"learning_rate": rate * greedylr_jax.get_scale(state)},
    ),
    "per parameter": _hypergradient("parameter", Look(drawing.GREEN)),
    "per group": _hypergradient("group", Look(drawing.BLUE)),
}


class History(NamedTuple):
    """The histories of a run; ``rates`` are the minimum, mean and maximum, or one for each group."""

    loss: np.ndarray  # shape=(steps,)
    rates: dict[str, np.ndarray]  # each of shape=(steps,)
    test_accuracy: np.ndarray  # shape=()


def train(
    task: Task, optimizer: str, method: str, steps: int, runs: list[tuple[int, float, float]]
) -> list[History]:
    """Trains runs of one method, each (seed, initial rate, hyper learning rate), in one compiled program."""
    make, _, _, read = METHODS[method]

    def one(run: tuple[jax.Array, jax.Array, jax.Array]) -> History:
        seed, rate, hyper_rate = run
        params, losses, rates = loop.train(
            task,
            make(OPTIMIZERS[optimizer](1.0), rate, hyper_rate),
            steps,
            seed,
            read=lambda state: read(state, rate),
        )
        return History(losses, rates, task.metric(params, task.test))

    columns = tuple(jnp.array(column) for column in zip(*runs, strict=True))
    histories = jax.device_get(jax.jit(lambda all_runs: jax.lax.map(one, all_runs))(columns))
    return [jax.tree.map(lambda leaf, row=row: leaf[row], histories) for row in range(len(runs))]


def tune(task: Task, optimizer: str, method: str, steps: int) -> dict[float, float]:
    """For each initial rate the hyper learning rate with the lowest final loss on the tuning seeds."""
    if not METHODS[method].has_hyper_rate:
        return dict.fromkeys(INITIAL_RATES, 0.0)
    runs = list(itertools.product(TUNING_SEEDS, INITIAL_RATES, HYPER_RATES))
    losses = [stage_losses(history.loss)[100] for history in train(task, optimizer, method, steps, runs)]
    means = np.mean(np.reshape(losses, (len(TUNING_SEEDS), len(INITIAL_RATES), -1)), axis=0)
    return {rate: HYPER_RATES[int(np.argmin(row))] for rate, row in zip(INITIAL_RATES, means, strict=True)}


def run(job: Job) -> None:
    """Trains all runs and writes rows, table, figures and report."""
    job.refuse_cluster()
    steps, seeds = PRESETS[job.preset]["steps"], PRESETS[job.preset]["seeds"]
    task, optimizer = make_task(job.one_task("digits")), job.one_optimizer("sgd")
    rows: list[dict[str, Any]] = []
    with make_progress(job.console, "parts") as progress:
        bar = progress.add_task("training", total=2 * len(METHODS))
        for method in METHODS:
            progress.update(bar, description=f"{method}: tuning")
            hyper_rates = tune(task, optimizer, method, steps)
            progress.update(bar, description=f"{method}: training", advance=1)
            specs = [(seed, rate, hyper_rates[rate]) for rate in INITIAL_RATES for seed in range(seeds)]
            histories = train(task, optimizer, method, steps, specs)
            rows += [_row(method, *pair) for pair in zip(specs, histories, strict=True)]
            progress.advance(bar)
    runs = pl.DataFrame(rows, infer_schema_length=None)
    table = summarize(runs)
    title = f"{task.name}, {optimizer}, {steps} steps, {seeds} seeds: loss at the end"
    print_table(job.console, title, _HEADERS, _cells(table), left=2)
    conclusion = conclude(table)
    job.console.print(conclusion)
    write_atomically(job.out / "runs.parquet", runs.write_parquet)
    publish(
        job,
        "First-order GreedyLR",
        f"One network trained with {optimizer} at a constant rate, with GreedyLR, and with hypergradient "
        f"descent: {title}. Figures 8 to 10 of the first GreedyLR paper. {conclusion}",
        tables={"table": table},
        figures={
            "fig8_losses": draw_losses(runs),
            "fig9_greedylr": draw_greedy(runs),
            "fig10_rates": draw_groups(runs),
        },
        sections=_sections(runs, table),
        recomputed_by="experiments.studies.hypergradient.summarize and conclude",
    )


def conclude(table: pl.DataFrame) -> str:
    """How the methods compare with a constant rate and GreedyLR, and where the grid is too narrow."""
    sentences, over_greedy, at_edge = [], [], []
    for row in table.filter(pl.col("method") != CONSTANT).iter_rows(named=True):
        name = f"{row['method']} from {row['learning_rate']:g}"
        sentences.append(f"{name}: {_relation(row['difference_low'], row['difference_high'])}")
        if not METHODS[row["method"]].has_hyper_rate:
            continue
        over_greedy.append(f"{name}: {_relation(row['over_greedy_low'], row['over_greedy_high'])}")
        if row["hyper_learning_rate"] in (HYPER_RATES[0], HYPER_RATES[-1]):
            at_edge.append(name)
    edge = f"is at its edge for {', '.join(at_edge)}" if at_edge else "is inside it everywhere"
    return (
        f"Final loss against the constant rate (95% confidence over seeds): {'; '.join(sentences)}. "
        f"Against GreedyLR: {'; '.join(over_greedy)}. The best "
        f"hyper learning rate of the grid from {HYPER_RATES[0]:g} to {HYPER_RATES[-1]:g} {edge}."
    )


def _relation(low: float, high: float) -> str:
    """How a loss compares, from the confidence interval of its difference."""
    return "significantly lower" if high < 0 else "significantly higher" if low > 0 else "not different"


def _row(method: str, spec: tuple[int, float, float], history: History) -> dict[str, Any]:
    seed, rate, hyper_rate = spec
    return {
        "method": method,
        "learning_rate": rate,
        "hyper_learning_rate": hyper_rate,
        "seed": seed,
        "final_loss": stage_losses(history.loss)[100],
        "test_accuracy": float(history.test_accuracy),
        "loss": history.loss.tolist(),
        "rates": {name: values.tolist() for name, values in sorted(history.rates.items())},
    }


def summarize(runs: pl.DataFrame) -> pl.DataFrame:
    """One row for each initial rate and method: mean final loss and its difference from the constant rate.

    ``over_greedy_low`` and ``over_greedy_high`` bound the mean difference from GreedyLR (95%, over seeds).
    """
    rows = []
    for (rate,), cell in runs.group_by(["learning_rate"], maintain_order=True):
        baseline, greedy = (
            cell.filter(pl.col("method") == name).sort("seed")["final_loss"].to_numpy()
            for name in (CONSTANT, "GreedyLR")
        )
        for (method,), group in cell.group_by(["method"], maintain_order=True):
            losses = group.sort("seed")["final_loss"].to_numpy()
            low, high = confidence_interval(losses - baseline)
            over_low, over_high = confidence_interval(losses - greedy)
            rows.append(
                {
                    "learning_rate": rate,
                    "method": method,
                    "hyper_learning_rate": group["hyper_learning_rate"][0],
                    "final_loss": float(np.mean(losses)),
                    "difference": float(np.mean(losses - baseline)),
                    "difference_low": low,
                    "difference_high": high,
                    "over_greedy_low": over_low,
                    "over_greedy_high": over_high,
                    "test_accuracy": 100 * float(group["test_accuracy"].mean()),
                }
            )
    return pl.DataFrame(rows)


_HEADERS = ("rate", "method", "hyper rate", "loss", "minus constant [95% CI]", "accuracy, %")


def _cells(table: pl.DataFrame) -> list[list[str]]:
    cells = []
    for row in table.iter_rows(named=True):
        cells.append(
            [
                f"{row['learning_rate']:g}",
                row["method"],
                f"{row['hyper_learning_rate']:g}" if METHODS[row["method"]].has_hyper_rate else "",
                f"{row['final_loss']:.3g}",
                "" if row["method"] == CONSTANT else interval_text(row, "+.2g"),
                f"{row['test_accuracy']:.1f}",
            ]
        )
    return cells


def _sections(runs: pl.DataFrame, table: pl.DataFrame) -> list[html.Section]:
    sections = []
    for rate in INITIAL_RATES:
        losses, rates, looks = [], [], _distinct_looks()
        for method, (_, look, _, _) in METHODS.items():
            mean = drawing.smooth(_histories(runs, method, rate, "loss").mean(axis=0), _WIDTH)
            losses.append(html.Curve(method, np.arange(len(mean)) + _WIDTH, mean, look.plotly()))
            first = runs.filter((pl.col("method") == method) & (pl.col("learning_rate") == rate))["rates"][0]
            shown = {name: values for name, values in first.items() if values is not None}
            for name, values in shown.items():
                rate_look = look if len(shown) == 1 else next(looks)
                smoothed = drawing.smooth(np.array(values, float), _WIDTH)
                steps = np.arange(len(smoothed)) + _WIDTH
                rates.append(html.Curve(f"{method}: {name}", steps, smoothed, rate_look.plotly()))
        parts = [
            html.line_figure(losses, "step", f"training loss, running mean of {_WIDTH}", y_log=True),
            html.line_figure(
                rates, "step", f"learning rate, first seed, running mean of {_WIDTH}", y_log=True
            ),
            html.Table(_HEADERS, _cells(table.filter(pl.col("learning_rate") == rate))),
        ]
        sections.append(html.Section(f"Initial rate {rate:g}", "", parts))
    return sections


def _distinct_looks() -> Iterator[Look]:
    """Looks for several rates in one panel, all different as long as there are at most 24."""
    return itertools.cycle(Look(color, line) for line in _LINES for color in _GROUP_COLORS)


def _panels(runs: pl.DataFrame, title: str) -> tuple[plt.Figure, list[tuple[plt.Axes, float]]]:
    """One panel for each initial rate."""
    rates = runs["learning_rate"].unique(maintain_order=True).to_list()
    figure, panels = drawing.panels(len(rates), len(rates), width=5.2, height=4.2)
    figure.suptitle(title, fontsize=12)
    for axes, rate in zip(panels, rates, strict=True):
        axes.set_title(f"initial rate {rate:g}", fontsize=10)
        axes.set_xlabel("step")
        axes.set_yscale("log")
    return figure, list(zip(panels, rates, strict=True))


def _histories(runs: pl.DataFrame, method: str, rate: float, column: str) -> np.ndarray:
    """Shape (seeds, steps)."""
    cell = runs.filter((pl.col("method") == method) & (pl.col("learning_rate") == rate))
    if column == "loss":
        return np.array(cell["loss"].to_list())
    return np.array([row[column] for row in cell["rates"].to_list()], float)


def draw_losses(runs: pl.DataFrame) -> plt.Figure:
    """Figure 8: loss histories of the four methods."""
    figure, panels = _panels(runs, f"Training loss (mean of the seeds, running mean over {_WIDTH} steps)")
    for axes, rate in panels:
        for method, (_, look, _, _) in METHODS.items():
            mean = _histories(runs, method, rate, "loss").mean(axis=0)
            smooth = drawing.smooth(mean, _WIDTH)
            axes.plot(np.arange(len(smooth)) + _WIDTH, smooth, **look.matplotlib(), lw=1.5, label=method)
        axes.set_ylabel("training loss")
    drawing.add_legend(figure, panels[0][0], columns=3)
    return figure


def draw_greedy(runs: pl.DataFrame) -> plt.Figure:
    """Figure 9: the learning rate of GreedyLR and the constant one."""
    figure, panels = _panels(runs, "Learning rate of GreedyLR (each line one seed) and the constant one")
    for axes, rate in panels:
        for method in (CONSTANT, "GreedyLR"):
            for index, values in enumerate(_histories(runs, method, rate, "learning_rate")):
                label = method if index == 0 else None
                axes.plot(values, **METHODS[method].look.matplotlib(), lw=1, label=label)
        axes.set_ylabel("learning rate")
    drawing.add_legend(figure, panels[0][0], columns=3)
    return figure


def draw_groups(runs: pl.DataFrame) -> plt.Figure:
    """Figure 10: learning rates per parameter (mean and range) and per group, of the first seed.

    Single rates are 0 in single steps, so running means are drawn, and the axis is linear near 0.
    """
    title = f"Learning rates of hypergradient descent (first seed, running mean over {_WIDTH} steps)"
    figure, panels = _panels(runs, title)
    for axes, rate in panels:
        low, mean, high = (
            drawing.smooth(_histories(runs, "per parameter", rate, f"learning_rate_{name}")[0], _WIDTH)
            for name in ("min", "mean", "max")
        )
        steps = np.arange(len(mean)) + _WIDTH
        axes.fill_between(steps, low, high, color=drawing.BLUE, alpha=0.2, lw=0)
        label = "per parameter: mean (band: minimum to maximum)"
        axes.plot(steps, mean, color=drawing.BLUE, lw=1.5, label=label)
        groups = _group_rates(runs, rate)
        for (name, values), look in zip(groups.items(), _distinct_looks(), strict=False):
            smoothed = drawing.smooth(values, _WIDTH)
            axes.plot(steps, smoothed, **look.matplotlib(), lw=1.3, label=f"per group: {name}")
        axes.axhline(rate, color=drawing.GREY, lw=1, label=CONSTANT)
        axes.set_ylabel("learning rate")
        axes.set_yscale("symlog", linthresh=rate / 10)
        axes.set_ylim(0, None)
    drawing.add_legend(figure, panels[0][0], columns=3)
    return figure


def _group_rates(runs: pl.DataFrame, rate: float) -> dict[str, np.ndarray]:
    """The learning rate of each parameter group in the first seed."""
    cell = runs.filter((pl.col("method") == "per group") & (pl.col("learning_rate") == rate))
    suffix = "/learning_rate"
    return {
        name.removesuffix(suffix): np.array(values, float)
        for name, values in cell["rates"][0].items()
        if values is not None and name.endswith(suffix)
    }
