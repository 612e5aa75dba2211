"""Appendices A and C of "LRTuner": how well a parabola fits the loss along the step, and how the noise of the
loss depends on the size of the superbatch.

Both are measured on one training of each task at a constant rate (the paper does not say at which rate), A
after 10% and after 50% of the steps, C after 50%. The loss is that of LRTuner's superbatch of 100 batches.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import polars as pl

from experiments.reporting import drawing, html
from experiments.tasks import make_task
from experiments.tasks.base import Batch, Params, Task
from experiments.training import loop
from experiments.training.engine import OPTIMIZERS
from greedylr_jax import superbatch_loss
from greedylr_jax.probing import _probe

SUPERBATCH, SAMPLES, TESTS = 100, 5, 21
SIZES = (1, 2, 5, 10, 20, 50, 100)  # of superbatches, in batches
DRAWS = 10  # of superbatches of each size, as in the paper
STAGES = (0.1, 0.5)  # of the steps
PROBE_WIDTH = 0.5  # the library's: samples within half the rate
_FITTED, _TESTED, _MINIMUM = "fitted", "tested", "minimum"

Setting = tuple[str, str, float, float]  # task, optimizer, learning rate, bound in learning rates


class Point(NamedTuple):
    """A training that was stopped."""

    params: Params
    step: optax.Updates  # of the optimizer at learning rate 1
    loss: jax.Array  # of the batch


def measure(settings: Sequence[Setting], steps: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Both appendices for each task and optimizer.

    Args:
      settings: task, optimizer, learning rate, and the bound of equation 3 at a loss of 1, in learning rates.
      steps: of a whole training.

    Returns:
      A frame of losses along the step: ``task``, ``optimizer``, ``stage`` (fraction of the steps),
      ``epsilon`` in learning rates, ``loss``, ``parabola`` (its value there), ``kind`` (a loss to which the
      parabola is "fitted", which is "tested" only, or its "minimum") and ``bound`` (the maximum of epsilon
      by equation 3). And a frame of standard deviations: ``task``, ``optimizer``, ``batches``, ``deviation``.
    """
    fits, deviations = [], []
    for name, optimizer, rate, bound in settings:
        task = make_task(name)
        about = {"task": name, "optimizer": optimizer}
        train, loss_at = _trainer(task, optimizer, rate, round(max(STAGES) * steps)), _loss_along(task)
        for stage in STAGES:
            point = train(round(stage * steps))
            fits += [about | {"stage": stage} | row for row in _fit(task, loss_at, point, rate, bound * rate)]
        deviations += [about | row for row in _deviations(task, point)]
    return pl.DataFrame(fits), pl.DataFrame(deviations)


def _trainer(task: Task, optimizer: str, rate: float, maximum: int) -> Callable[[int], Point]:
    """A function of the number of steps, at most ``maximum``, that trains with the batches of seed 0."""
    inner = OPTIMIZERS[optimizer](1.0)
    tx = optax.with_extra_args_support(optax.chain(inner, optax.scale(rate)))

    @jax.jit
    def train(steps: jax.Array) -> Point:
        init_key, batch_key = jax.random.split(jax.random.key(0))
        params = task.init(init_key)
        batches = loop.batch_indices(task, maximum + 1, batch_key)

        def body(step: jax.Array, carry: Any) -> Any:
            batch = loop.take(task.train, batches[step])
            params, state, _ = loop.train_step(task, tx, *carry, batch)
            return params, state

        params, state = jax.lax.fori_loop(0, steps, body, (params, tx.init(params)))
        loss, grads = jax.value_and_grad(task.loss)(params, loop.take(task.train, batches[steps]))
        step, _ = optax.with_extra_args_support(inner).update(grads, state[0], params, value=loss)
        return Point(params, step, loss)

    return train


def _loss_along(task: Task) -> Callable[..., jax.Array]:
    """A function of a point, a distance along its step, and stacked batches: the mean loss there."""

    @jax.jit
    def loss_at(point: Point, distance: jax.Array, batches: Batch) -> jax.Array:
        value_fn = superbatch_loss(task.loss, batches)
        return _probe.losses_along(value_fn, point.params, point.step, distance[None])[0]

    return loss_at


def _superbatches(task: Task, seed: int, batches: int) -> Batch:
    """Random batches of the training examples, stacked along the leading axis."""
    rows = np.random.default_rng(seed).integers(task.num_examples, size=(batches, task.batch_size))
    return loop.take(task.train, jnp.asarray(rows))


def _fit(
    task: Task, loss_at: Callable[..., jax.Array], point: Point, rate: float, bound: float
) -> list[dict[str, Any]]:
    """Losses around the rate, the parabola, and its minimum after clipping, as in LRTuner."""
    batches = _superbatches(task, 0, SUPERBATCH)
    limit = float(bound * np.cbrt(abs(float(point.loss))))
    width = min(limit, PROBE_WIDTH * rate)

    def losses_at(epsilons: np.ndarray) -> np.ndarray:
        return np.array([loss_at(point, jnp.float32(rate + epsilon), batches) for epsilon in epsilons])

    fitted = np.linspace(-width, width, SAMPLES)
    losses = losses_at(fitted)
    k0, k1, k2 = (float(k) for k in _probe.fit_parabola(jnp.asarray(losses), jnp.asarray(width)))
    minimum = -k1 / (2 * k2) if k2 > 0 else -np.sign(k1) * limit
    clipped = float(np.clip(minimum, -limit, limit))
    span = 2 * max(width, abs(clipped))  # beyond the samples, to show the error of the extrapolation
    tested = np.linspace(-min(span, rate), span, TESTS)
    kinds = {_FITTED: fitted, _TESTED: tested, _MINIMUM: np.array([clipped])}
    return [
        {
            "epsilon": float(epsilon / rate),
            "loss": float(loss),
            "parabola": float(k0 + k1 * epsilon + k2 * epsilon**2),
            "kind": kind,
            "bound": limit / rate,
        }
        for kind, epsilons in kinds.items()
        for epsilon, loss in zip(epsilons, losses_at(epsilons), strict=True)
    ]


def _deviations(task: Task, point: Point) -> list[dict[str, Any]]:
    """Standard deviation of the loss over superbatches of each size, from batches drawn once."""
    loss = jax.jit(lambda batch: task.loss(point.params, batch))
    rows = []
    for size in SIZES:
        means = [_mean_loss(loss, _superbatches(task, 1 + draw, size)) for draw in range(DRAWS)]
        rows.append({"batches": size, "deviation": float(np.std(means, ddof=1))})
    return rows


def _mean_loss(loss: Any, batches: Batch) -> float:
    each = [loss(jax.tree.map(lambda leaf, row=row: leaf[row], batches)) for row in range(_length(batches))]
    return float(np.mean(each))


def _length(batches: Batch) -> int:
    return len(next(iter(batches.values())))


def _panels(fits: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    """Title and rows of each panel of Appendix A."""
    keys = ["task", "optimizer", "stage"]
    return [
        (f"{task}, {optimizer}, after {100 * stage:g}% of the steps", cell)
        for (task, optimizer, stage), cell in fits.group_by(keys, maintain_order=True)
    ]


def draw_fits(fits: pl.DataFrame) -> plt.Figure:
    """Figures 1 to 3 of the paper: losses, parabola and minimum against the change of the rate."""
    titled = _panels(fits)
    figure, panels = drawing.panels(len(titled), len(STAGES), width=5.2, height=3.0)
    markers = {_FITTED: ("^", drawing.ORANGE), _TESTED: ("v", drawing.GREEN), _MINIMUM: ("^", drawing.PINK)}
    for axes, (title, cell) in zip(panels, titled, strict=True):
        curve = cell.filter(kind=_TESTED).sort("epsilon")
        axes.plot(curve["epsilon"], curve["parabola"], color=drawing.BLUE, lw=1.4, label="parabola")
        for kind in (_TESTED, _FITTED, _MINIMUM):
            own, (marker, color) = cell.filter(kind=kind), markers[kind]
            axes.plot(own["epsilon"], own["loss"], marker, color=color, ms=5, label=f"loss, {kind}")
        lowest = cell.filter(kind=_MINIMUM)
        axes.plot(
            lowest["epsilon"], lowest["parabola"], "o", color=drawing.RED, ms=5, label="parabola, minimum"
        )
        axes.axvline(0, color=drawing.GREY, lw=0.8)
        axes.set_title(f"{title}; bound {cell['bound'][0]:.3g}", fontsize=9)
        axes.set_xlabel("epsilon / learning rate")
        axes.set_ylabel("superbatch loss")
    drawing.add_legend(figure, panels[0], columns=5)
    figure.suptitle("Appendix A: the quadratic approximation", fontsize=12)
    return figure


def draw_deviations(deviations: pl.DataFrame) -> plt.Figure:
    """Figure 4 of the paper: standard deviation of the loss against the size of the superbatch."""
    figure, (axes,) = drawing.panels(1, 1, width=6, height=4)
    for (task,), cell in deviations.group_by(["task"], maintain_order=True):
        axes.plot(cell["batches"], cell["deviation"], marker="o", ms=3, label=task)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("batches in the superbatch")
    axes.set_ylabel(f"standard deviation of the loss, {DRAWS} draws")
    drawing.add_legend(figure, axes)
    figure.suptitle("Appendix C: noise of the superbatch loss", fontsize=12)
    return figure


def fit_errors(fits: pl.DataFrame) -> pl.DataFrame:
    """For each task and stage the errors of the parabola, relative to the range of the tested losses.

    Returns:
      A frame with ``task``, ``optimizer``, ``stage``; ``within``: the largest error at tested losses between
      the fitted ones; ``beyond``: outside of them (None if there are none); ``at_minimum``: at the minimum;
      ``is_clipped``: whether equation 3 bounds the minimum.
    """
    rows = []
    keys = ["task", "optimizer", "stage"]
    for key, cell in fits.group_by(keys, maintain_order=True):
        scale = float(np.ptp(cell["loss"].to_numpy()))
        errors = cell.with_columns(error=(pl.col("loss") - pl.col("parabola")).abs() / scale)
        width = float(cell.filter(kind=_FITTED)["epsilon"].max())
        tested, lowest = errors.filter(kind=_TESTED), errors.filter(kind=_MINIMUM)
        is_within = pl.col("epsilon").abs() <= width * (1 + 1e-6)
        rows.append(
            dict(zip(keys, key, strict=True))
            | {
                "within": tested.filter(is_within)["error"].max(),
                "beyond": tested.filter(~is_within)["error"].max(),
                "at_minimum": lowest["error"][0],
                "is_clipped": bool(abs(lowest["epsilon"][0]) >= cell["bound"][0] * (1 - 1e-6)),
            }
        )
    return pl.DataFrame(rows, infer_schema_length=None)


def sections(fits: pl.DataFrame, deviations: pl.DataFrame) -> list[html.Section]:
    """The report of both appendices."""
    percent = functools.partial(_percent, missing="")
    errors = [
        [
            row["task"],
            f"{100 * row['stage']:g}%",
            percent(row["within"]),
            percent(row["beyond"]),
            percent(row["at_minimum"]),
            "yes" if row["is_clipped"] else "no",
        ]
        for row in fit_errors(fits).iter_rows(named=True)
    ]
    headers = ("task", "after", "error between the samples", "beyond them", "at the minimum", "clipped")
    parts: list[Any] = [html.Table(headers, errors)]
    for title, cell in _panels(fits):
        curves = [
            html.Curve(f"{name} ({kind})", own["epsilon"], own[name])
            for kind in (_TESTED, _FITTED, _MINIMUM)
            for own in [cell.filter(kind=kind).sort("epsilon")]
            for name in ("loss", "parabola")
        ]
        figure = html.line_figure(curves, f"epsilon / learning rate ({title})", "superbatch loss")
        parts.append(figure.update_traces(mode="lines+markers"))
    curves = [
        html.Curve(task, cell["batches"], cell["deviation"])
        for (task,), cell in deviations.group_by(["task"], maintain_order=True)
    ]
    figure = html.line_figure(
        curves, "batches in the superbatch", "standard deviation of the loss", x_log=True, y_log=True
    )
    relative = "Errors of the parabola relative to the range of the losses."
    return [
        html.Section("Appendix A: the quadratic approximation", relative, parts),
        html.Section("Appendix C: noise of the superbatch loss", f"{DRAWS} superbatches each.", [figure]),
    ]


def _percent(value: float | None, missing: str) -> str:
    return missing if value is None else f"{100 * value:.1f}%"
