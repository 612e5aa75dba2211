"""The losses of a stretch of training: their mean and their spread, kept as they come."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from greedylr_jax import _numerics

LONGEST = 2**24  # losses that a window may have: float32 counts no further
NEAR = 3  # losses whose mean tells that the loss has risen
_ERRORS = 6.0  # standard errors that are no noise


class Window(NamedTuple):
    """The losses since some moment; those that are not finite are counted, and left out of the rest.

    One array holds all: on a CPU each array of a state is a kernel of its own, to be compiled and started.
    """

    numbers: jax.Array  # shape=(4,), dtype=float; the properties below, in their order

    @property
    def steps(self) -> jax.Array:
        """How many losses, exact up to :data:`LONGEST`."""
        return self.numbers[..., 0]

    @property
    def finite(self) -> jax.Array:
        """How many of them were finite."""
        return self.numbers[..., 1]

    @property
    def mean(self) -> jax.Array:
        """The mean of those."""
        return self.numbers[..., 2]

    @property
    def squares(self) -> jax.Array:
        """The sum of their squared deviations from the mean."""
        return self.numbers[..., 3]


def empty_window() -> Window:
    """A window without losses."""
    return Window(jnp.zeros(4, _numerics.default_float_dtype()))


def observe(window: Window, loss: jax.Array) -> Window:
    """Welford's update of mean and squared deviations."""
    finite = jnp.isfinite(loss)
    count = window.finite + finite.astype(loss.dtype)
    deviation = _numerics.where(finite, loss - window.mean, 0)
    mean = window.mean + deviation / jnp.maximum(count, 1)
    squares = window.squares + deviation * _numerics.where(finite, loss - mean, 0)
    return Window(jnp.stack([window.steps + 1, count, mean, squares]))


def variance(window: Window) -> jax.Array:
    """Of single losses; 0 where fewer than two are known."""
    return window.squares / jnp.maximum(window.finite - 1, 1)


def mean_variance(window: Window) -> jax.Array:
    """Squared standard error of the mean; 0 where fewer than two are known."""
    return variance(window) / jnp.maximum(window.finite, 1)


def rise_limit(mean: jax.Array, variance: jax.Array) -> jax.Array:
    """What the mean of three losses exceeds if they have risen by more than noise explains."""
    return mean + _ERRORS * jnp.sqrt(variance / NEAR)
