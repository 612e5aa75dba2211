"""Figures of a training run and of a range test (requires Matplotlib)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from greedylr_jax.range_test import RangeTestResult, suggest_best, suggest_steepest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOSS, _RATE = "#0072B2", "#D55E00"
# Changes of the learning rate: marker and color.
_EVENTS = {"raise": ("^", "#009E73"), "cut": ("v", "#CC3311"), "reset": ("D", "#111111")}
_MAX_MARKERS = 200  # more would cover the curve


def plot_history(
    loss: ArrayLike,
    history: ArrayLike | Mapping[str, ArrayLike],
    *,
    base_learning_rate: float | None = None,
    validation: tuple[ArrayLike, ArrayLike] | None = None,
    smooth: int = 1,
    title: str | None = None,
) -> "Figure":
    """Plots loss and learning rate against the step, and marks increases, decreases and resets of the rate.

    Args:
      loss: training loss of each step, shape (steps,). Values that are not finite leave gaps.
      history: learning rate of each step, shape (steps,); or the stacked dicts of
        :func:`greedylr_jax.metrics`, with a key ``learning_rate`` or ``scale``. With both keys
        ``learning_rate`` is drawn, which after :func:`greedylr_jax.hypergradient` does not include the scale
        of a further rule: pass the product as an array. Resets, at which
        ``best_value`` or ``num_observations`` restarts, can be marked only with the dicts.
      base_learning_rate: multiplies ``scale`` if ``history`` has no ``learning_rate``.
      validation: steps and losses of a second curve, such as a validation loss.
      smooth: width of a running mean over the loss, in steps, >= 1; the raw loss stays visible behind it.
      title: title of the figure.

    Returns:
      The Matplotlib figure with two axes, loss and learning rate, each logarithmic if its values are
      positive. It is not attached to a window: show it in a notebook or call its ``savefig``.

    Raises:
      ImportError: if Matplotlib is not installed.
      ValueError: if lengths differ, ``smooth`` is less than 1, or ``history`` holds no rate.

    Examples:
      >>> import numpy as np
      >>> from greedylr_jax.plotting import plot_history
      >>> figure = plot_history(np.exp(-np.arange(5.0)), np.array([1.0, 1.0, 2.0, 2.0, 1.0]))
      >>> [axes.get_ylabel() for axes in figure.axes]
      ['loss', 'learning rate']
    """
    losses = np.asarray(loss, float)
    rates, label = _rates(history, base_learning_rate)
    if losses.ndim != 1 or losses.shape != rates.shape:
        raise ValueError(
            f"loss and history must hold one value a step, got shapes {losses.shape} and {rates.shape}."
        )
    if smooth < 1:
        raise ValueError(f"smooth must be an integer >= 1, got {smooth!r}.")

    figure = _new_figure("plot_history", (8, 5.5))
    above, below = figure.subplots(2, 1, sharex=True)
    steps = np.arange(1, len(losses) + 1)
    finite = np.where(np.isfinite(losses), losses, np.nan)
    above.plot(steps, finite, color=_LOSS, lw=0.8 if smooth > 1 else 1.2, alpha=0.35 if smooth > 1 else 1)
    if smooth > 1:
        above.plot(steps, _running_mean(finite, smooth), color=_LOSS, lw=1.5, label=f"mean of {smooth}")
    if validation is not None:
        above.plot(*map(np.asarray, validation), color="#E69F00", marker=".", lw=1, label="validation")
    if smooth > 1 or validation is not None:
        above.legend(frameon=False)
    above.set_ylabel("loss")
    if np.nanmin(finite, initial=np.inf) > 0:
        above.set_yscale("log")

    below.step(steps, rates, where="mid", color=_RATE, lw=1.5)
    for name, found in _events(rates, history).items():
        _mark(below, steps[found], rates[found], name)
    below.set_ylabel(label)
    below.set_xlabel("step")
    if len(rates) and rates.min() > 0:
        below.set_yscale("log")
    if below.get_legend_handles_labels()[0]:
        below.legend(frameon=False)
    for axes in (above, below):
        axes.grid(alpha=0.25, lw=0.5)
    if title:
        figure.suptitle(title)
    return figure


def plot_range_test(result: RangeTestResult, *, title: str | None = None) -> "Figure":
    """Plots the loss of a learning-rate range test against the learning rate, and marks both suggestions.

    Args:
      result: returned by :func:`greedylr_jax.range_test.range_test`.
      title: title of the figure.

    Returns:
      The Matplotlib figure; it is not attached to a window.

    Raises:
      ImportError: if Matplotlib is not installed.

    Examples:
      >>> import jax.numpy as jnp
      >>> from greedylr_jax.plotting import plot_range_test
      >>> from greedylr_jax.range_test import RangeTestResult
      >>> rates, losses = jnp.array([0.1, 0.2, 0.4, 0.8, 1.6]), jnp.array([5.0, 4.9, 2.0, 1.0, 7.0])
      >>> figure = plot_range_test(RangeTestResult(rates, losses, losses))
      >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
      ['after each step', 'smoothed', 'lowest, at 0.8', 'steepest, at 0.4']
    """
    figure = _new_figure("plot_range_test", (7, 4.5))
    axes = figure.subplots()
    rates = np.asarray(result.learning_rates)
    losses = np.where(np.isfinite(result.losses), result.losses, np.nan)
    smoothed = np.where(np.isfinite(result.smoothed), result.smoothed, np.nan)
    axes.plot(rates, losses, ".", color=_LOSS, ms=3, alpha=0.4, label="after each step")
    axes.plot(rates, smoothed, color=_LOSS, lw=1.8, label="smoothed")
    suggestions = {"lowest": suggest_best(result), "steepest": suggest_steepest(result)}
    for (name, rate), marker in zip(suggestions.items(), "vD", strict=True):
        if np.isfinite(rate):
            height = np.interp(rate, rates, smoothed)
            axes.plot(rate, height, marker, color=_RATE, ms=9, ls="none", label=f"{name}, at {rate:.3g}")
    if np.isfinite(smoothed).any():  # losses after divergence would flatten the rest
        low, high = np.nanmin(smoothed), np.nanmax(smoothed)
        margin = 0.25 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + margin)
    if not np.allclose(rates, np.linspace(rates[0], rates[-1], len(rates))):  # equally spaced
        axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25, lw=0.5)
    axes.legend(frameon=False)
    if title:
        axes.set_title(title)
    return figure


def _new_figure(name: str, size: tuple[float, float]) -> "Figure":
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  (an optional dependency)
    except ImportError as error:
        raise ImportError(f"{name} requires Matplotlib: pip install matplotlib") from error
    return Figure(figsize=size, layout="constrained")


def _rates(
    history: ArrayLike | Mapping[str, ArrayLike], base_learning_rate: float | None
) -> tuple[np.ndarray, str]:
    """The learning rate or scale of each step, and its axis label."""
    if not isinstance(history, Mapping):
        return np.asarray(history, float), "learning rate"
    if "learning_rate" in history:
        return np.asarray(history["learning_rate"], float), "learning rate"
    if "scale" not in history:
        raise ValueError(
            f"history must have a key 'learning_rate' or 'scale', got the keys {sorted(history)}. If the "
            "metrics were read with a prefix, remove it from the keys."
        )
    scale = np.asarray(history["scale"], float)
    if base_learning_rate is None:
        return scale, "scale of the learning rate"
    return scale * base_learning_rate, "learning rate"


def _events(rates: np.ndarray, history: ArrayLike | Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    """For each kind of event, whether it occurs at each step."""
    if not len(rates):
        return {}
    change = np.diff(rates, prepend=rates[:1])
    reset = np.zeros(len(rates), bool)
    if isinstance(history, Mapping):
        best = np.asarray(history.get("best_value", np.zeros(len(rates))), float)
        reset[1:] |= np.isinf(best[1:]) & np.isfinite(best[:-1])
        seen = np.asarray(history.get("num_observations", np.zeros(len(rates))))
        reset[1:] |= seen[1:] < seen[:-1]
    return {"raise": (change > 0) & ~reset, "cut": (change < 0) & ~reset, "reset": reset}


def _mark(axes: Any, steps: np.ndarray, rates: np.ndarray, name: str) -> None:
    if not len(steps):
        return
    marker, color = _EVENTS[name]
    if len(steps) > _MAX_MARKERS:
        shown = np.linspace(0, len(steps) - 1, _MAX_MARKERS).astype(int)
    else:
        shown = np.arange(len(steps))
    label = f"{name} ({len(steps)})"
    axes.plot(steps[shown], rates[shown], marker, color=color, ms=4, ls="none", label=label)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the last ``width`` values, fewer at the start; gaps count as missing."""
    present = np.isfinite(values)
    sums = np.cumsum(np.where(present, values, 0.0))
    counts = np.cumsum(present)
    sums[width:] -= sums[:-width].copy()
    counts[width:] -= counts[:-width].copy()
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
