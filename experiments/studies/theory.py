"""Final loss as a function of GreedyLR's factor on convex functions of known smoothness: is 1 - 1/L optimal?

The factor F = 1 - 1/L_max is attributed to the second GreedyLR paper, see
:func:`greedylr_jax.theory.optimal_factor`. In this study gradient descent with GreedyLR minimizes functions
of known smoothness L from several initial rates, with every factor of a grid, and with exact and noisy
gradients.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import polars as pl

from experiments.reporting import drawing, html
from experiments.reporting.palette import Look
from experiments.reporting.tables import print_table
from experiments.studies.base import Job, publish
from experiments.training.engine import OPTIMIZERS
from experiments.training.store import write_atomically
from greedylr_jax import greedy_lr
from greedylr_jax.theory import optimal_factor

SMOOTHNESS = (2.0, 5.0, 20.0, 100.0)
FACTORS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.97, 0.99)
INITIAL_RATES = (0.01, 0.1, 1.0)  # times 1/L
NOISES = (0.0, 0.1)  # of each element of the gradient, times L
PATIENCE, STEPS, DIMENSIONS = 5, 500, 20
PRESETS = {"quick": {"starts": 20}, "full": {"starts": 200}}


class Objective(NamedTuple):
    """A convex function of the smoothness and the point, with minimum 0 at 0."""

    value: Callable[[jax.Array, jax.Array], jax.Array]
    title: str


def _curvatures(smoothness: jax.Array) -> jax.Array:
    return smoothness * jnp.geomspace(0.01, 1.0, DIMENSIONS)


OBJECTIVES = {
    "quadratic": Objective(
        lambda smoothness, x: 0.5 * jnp.sum(_curvatures(smoothness) * x**2), "quadratic, condition number 100"
    ),
    "pseudo-Huber": Objective(
        lambda smoothness, x: jnp.sum(_curvatures(smoothness) * x**2 / (jnp.sqrt(1 + x**2) + 1)),
        "pseudo-Huber: asymptotically linear",
    ),
}


def final_loss(
    objective: str,
    optimizer: str,
    smoothness: jax.Array,
    factor: jax.Array,
    initial_rate: jax.Array,
    noise: jax.Array,
    seed: jax.Array,
) -> jax.Array:
    """The final loss of gradient descent with GreedyLR; all arguments but the first two may be traced."""
    start_key, noise_key = jax.random.split(jax.random.key(seed))
    tx = optax.chain(
        OPTIMIZERS[optimizer](initial_rate / smoothness),
        # A relative threshold, so that the unit of the loss changes no decision.
        greedy_lr(factor, PATIENCE, threshold_mode="rel", window=None, min_scale=1e-3, max_scale=1e3),
    )
    loss_fn = lambda x: OBJECTIVES[objective].value(smoothness, x)  # noqa: E731

    def body(carry: Any, key: jax.Array) -> Any:
        x, state = carry
        loss, gradient = jax.value_and_grad(loss_fn)(x)
        gradient += noise * smoothness * jax.random.normal(key, x.shape)
        updates, state = tx.update(gradient, state, x, value=loss)
        return (optax.apply_updates(x, updates), state), None

    x = jax.random.normal(start_key, (DIMENSIONS,))
    (x, _), _ = jax.lax.scan(body, (x, tx.init(x)), jax.random.split(noise_key, STEPS))
    return loss_fn(x)


def run(job: Job) -> None:
    """Trains all runs (in seconds, so nothing is resumed) and writes rows, table, figure and report."""
    job.refuse_cluster()
    optimizer = job.one_optimizer("sgd")
    runs = train_all(PRESETS[job.preset]["starts"], job.tasks(tuple(OBJECTIVES), OBJECTIVES), optimizer)
    table = summarize(runs)
    title = "Median final loss of the best factor and of the paper's factor"
    print_table(job.console, title, _HEADERS, _cells(table))
    conclusion = conclude(table)
    job.console.print(conclusion)
    write_atomically(job.out / "runs.parquet", runs.write_parquet)
    publish(
        job,
        "The optimal factor",
        f"Median final loss of {optimizer} with GreedyLR after {STEPS} steps, patience {PATIENCE}, bounds at "
        "1/1000 and 1000 times the initial rate, against the factor; the dotted line is 1 - 1/L. "
        f"{conclusion}",
        tables={"table": table},
        figures={"theory": draw(runs)},
        sections=_sections(runs, table),
        recomputed_by="experiments.studies.theory.summarize",
    )


def train_all(
    starts: int, objectives: Sequence[str] = tuple(OBJECTIVES), optimizer: str = "sgd"
) -> pl.DataFrame:
    """One row per run, for every objective, smoothness, factor (including 1 - 1/L), rate, noise and seed.

    Returns:
      A frame with these columns, ``is_claimed`` (whether the factor is the paper's) and ``loss``.
    """
    frames = []
    for objective in objectives:
        grid = [
            (smoothness, factor, rate, noise, seed, factor == claimed(smoothness))
            for smoothness in SMOOTHNESS
            for factor in sorted({*FACTORS, claimed(smoothness)})
            for rate, noise, seed in itertools.product(INITIAL_RATES, NOISES, range(starts))
        ]
        columns = [np.array(column) for column in zip(*grid, strict=True)]
        mapped = jax.vmap(lambda *arguments, name=objective: final_loss(name, optimizer, *arguments))
        losses = jax.jit(mapped)(*(jnp.asarray(column, jnp.float32) for column in columns[:4]), columns[4])
        names = ("smoothness", "factor", "initial_rate", "noise", "seed", "is_claimed")
        frame = pl.DataFrame(dict(zip(names, columns, strict=True)))
        frames.append(
            frame.with_columns(objective=pl.lit(objective), loss=pl.Series(np.asarray(losses, np.float64)))
        )
    return pl.concat(frames)


def claimed(smoothness: float) -> float:
    """The paper's factor, rounded from float32 to equal the factor of the grid if it is one."""
    return round(float(optimal_factor(smoothness)), 6)


_CELL = ["objective", "smoothness", "initial_rate", "noise"]


def summarize(runs: pl.DataFrame) -> pl.DataFrame:
    """One row for each objective, smoothness, initial rate and noise.

    Returns:
      A frame with the factor of the lowest median final loss (``best_factor``), that loss (``best_loss``),
      the paper's factor (``claimed_factor``), its median loss (``claimed_loss``), and ``claimed_rank``: 1 if
      no other factor of the grid has a lower loss, 2 if one has, and so on, of ``num_factors``.
    """
    medians = runs.group_by([*_CELL, "factor", "is_claimed"], maintain_order=True).agg(
        pl.col("loss").median()
    )
    rows = []
    for key, cell in medians.group_by(_CELL, maintain_order=True):
        best = cell.sort("loss").row(0, named=True)
        paper = cell.filter("is_claimed").row(0, named=True)
        rows.append(
            dict(zip(_CELL, key, strict=True))
            | {
                "best_factor": best["factor"],
                "best_loss": best["loss"],
                "claimed_factor": paper["factor"],
                "claimed_loss": paper["loss"],
                "claimed_rank": 1 + int((cell["loss"] < paper["loss"]).sum()),
                "num_factors": len(cell),
            }
        )
    return pl.DataFrame(rows)


_HEADERS = ("function", "L", "rate x L", "noise", "best F", "loss", "1 - 1/L", "loss", "rank")


def _cells(table: pl.DataFrame) -> list[list[str]]:
    return [
        [
            row["objective"],
            f"{row['smoothness']:g}",
            f"{row['initial_rate']:g}",
            f"{row['noise']:g}",
            f"{row['best_factor']:g}",
            f"{row['best_loss']:.2g}",
            f"{row['claimed_factor']:g}",
            f"{row['claimed_loss']:.2g}",
            f"{row['claimed_rank']} of {row['num_factors']}",
        ]
        for row in table.iter_rows(named=True)
    ]


def conclude(table: pl.DataFrame) -> str:
    """How often the paper's factor is the best one, and whether the best one depends on the smoothness."""
    ranks = table["claimed_rank"].to_numpy()
    cells = table.group_by("objective", "initial_rate", "noise").agg(pl.col("best_factor").n_unique())
    return (
        f"1 - 1/L is the best factor of the grid in {np.sum(ranks == 1)} of {len(ranks)} cells; its median "
        f"rank is {np.median(ranks):g} of about {table['num_factors'].median():g}. The best factor is the "
        f"same for all L in {(cells['best_factor'] == 1).sum()} of {len(cells)} combinations of function, "
        "initial rate and noise."
    )


def _curves(runs: pl.DataFrame, objective: str, noise: float) -> list[tuple[float, float, pl.DataFrame]]:
    """(smoothness, initial rate, median loss of each factor) for one panel."""
    own = runs.filter((pl.col("objective") == objective) & (pl.col("noise") == noise))
    medians = own.group_by(["smoothness", "initial_rate", "factor", "is_claimed"]).agg(
        pl.col("loss").median()
    )
    return [
        (*key, cell.sort("factor"))
        for key, cell in medians.sort("smoothness", "initial_rate").group_by(
            ["smoothness", "initial_rate"], maintain_order=True
        )
    ]


COLORS = dict(zip(SMOOTHNESS, (drawing.SKY, drawing.GREEN, drawing.ORANGE, drawing.RED), strict=True))
LINES = dict(zip(INITIAL_RATES, (":", "--", "-"), strict=True))


def draw(runs: pl.DataFrame) -> plt.Figure:
    """Loss against factor, a panel for each objective and noise; dots mark the paper's factor."""
    objectives = runs["objective"].unique(maintain_order=True)
    size = (11, 4 * len(objectives))
    figure, grid = plt.subplots(
        len(objectives), len(NOISES), figsize=size, sharex=True, squeeze=False, layout="constrained"
    )
    for (objective, noise), axes in zip(itertools.product(objectives, NOISES), grid.flat, strict=True):
        for smoothness, rate, cell in _curves(runs, objective, noise):
            label = f"L = {smoothness:g}, rate {rate:g}/L"
            look = Look(COLORS[smoothness], LINES[rate])
            # A logarithmic axis cannot show 0.
            losses = np.maximum(cell["loss"].to_numpy(), 1e-30)
            axes.plot(cell["factor"], losses, **look.matplotlib(), lw=1.4, label=label)
            at = int(cell["is_claimed"].arg_max())
            axes.plot(cell["factor"][at], losses[at], "o", color=look.color, ms=6)
        axes.set_yscale("log")
        axes.set_title(f"{OBJECTIVES[objective].title}; gradient noise {noise:g} L", fontsize=10)
        axes.grid(alpha=0.25, lw=0.5)
    for axes in grid[-1]:
        axes.set_xlabel("factor F")
    for axes in grid[:, 0]:
        axes.set_ylabel("median final loss")
    drawing.add_legend(figure, grid[0, 0])
    figure.suptitle("Final loss against GreedyLR's factor; dots: the paper's 1 - 1/L", fontsize=12)
    return figure


def _sections(runs: pl.DataFrame, table: pl.DataFrame) -> list[html.Section]:
    sections = []
    for objective, noise in itertools.product(runs["objective"].unique(maintain_order=True), NOISES):
        figure = html.line_figure(
            [
                html.Curve(
                    f"L = {smoothness:g}, rate {rate:g}/L",
                    cell["factor"],
                    cell["loss"],
                    Look(COLORS[smoothness], LINES[rate]).plotly(),
                )
                for smoothness, rate, cell in _curves(runs, objective, noise)
            ],
            "factor F",
            "median final loss",
            y_log=True,
        )
        for smoothness in SMOOTHNESS:
            figure.add_vline(
                x=claimed(smoothness), line={"color": COLORS[smoothness], "dash": "dot", "width": 1}
            )
        own = table.filter((pl.col("objective") == objective) & (pl.col("noise") == noise))
        title = f"{OBJECTIVES[objective].title}; gradient noise {noise:g} L"
        sections.append(html.Section(title, "", [figure, html.Table(_HEADERS, _cells(own))]))
    return sections
