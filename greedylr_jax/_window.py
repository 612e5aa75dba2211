"""The losses of a stretch of training: their mean and their spread, kept as they come."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from greedylr_jax import base

NEAR = 3  # losses whose mean tells that the loss has risen
_ERRORS = 6.0  # standard errors that are no noise


class Window(NamedTuple):
    """The losses since some moment; those that are not finite are counted, and left out of the rest."""

    steps: jax.Array  # shape=(), dtype=int32
    finite: jax.Array  # shape=(), dtype=int32; how many of them were finite
    mean: jax.Array  # shape=(), dtype=float
    squares: jax.Array  # shape=(), dtype=float; sum of squared deviations from the mean


def empty_window() -> Window:
    """A window without losses."""
    # Arrays of their own: the same one twice in a state could not be donated.
    return Window(
        steps=jnp.zeros((), jnp.int32),
        finite=jnp.zeros((), jnp.int32),
        mean=jnp.zeros((), base.default_float_dtype()),
        squares=jnp.zeros((), base.default_float_dtype()),
    )


def observe(window: Window, loss: jax.Array) -> Window:
    """Welford's update of mean and squared deviations."""
    finite = jnp.isfinite(loss)
    count = window.finite + finite.astype(jnp.int32)
    deviation = jnp.where(finite, loss - window.mean, 0)
    mean = window.mean + deviation / jnp.maximum(count, 1).astype(loss.dtype)
    squares = window.squares + deviation * jnp.where(finite, loss - mean, 0)
    return Window(window.steps + 1, count, mean, squares)


def variance(window: Window) -> jax.Array:
    """Of single losses; 0 where fewer than two are known."""
    return window.squares / jnp.maximum(window.finite - 1, 1).astype(window.squares.dtype)


def mean_variance(window: Window) -> jax.Array:
    """Squared standard error of the mean; 0 where fewer than two are known."""
    return variance(window) / jnp.maximum(window.finite, 1).astype(window.squares.dtype)


def rise_limit(mean: jax.Array, variance: jax.Array) -> jax.Array:
    """What the mean of three losses exceeds if they have risen by more than noise explains."""
    return mean + _ERRORS * jnp.sqrt(variance / NEAR)
