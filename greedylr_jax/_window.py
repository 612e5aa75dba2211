"""Running mean and variance of the losses of a window."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from greedylr_jax import _numerics

LONGEST = 2**24  # maximum number of losses in a window: float32 counts exactly up to it
NEAR = 3  # number of recent losses whose mean is compared with a threshold
_ERRORS = 6.0  # standard errors between the mean and the threshold


class Window(NamedTuple):
    """Statistics of the losses since the window was cleared; those that are not finite are only counted.

    One array holds all: on a CPU each array of a state is a kernel of its own, to be compiled and started.
    """

    numbers: jax.Array  # shape=(4,), dtype=float; the properties below, in their order

    @property
    def steps(self) -> jax.Array:
        """Number of losses, exact up to :data:`LONGEST`."""
        return self.numbers[..., 0]

    @property
    def finite(self) -> jax.Array:
        """Number of finite losses."""
        return self.numbers[..., 1]

    @property
    def mean(self) -> jax.Array:
        """Mean of the finite losses, 0 if there are none."""
        return self.numbers[..., 2]

    @property
    def squares(self) -> jax.Array:
        """Sum of the squared deviations of the finite losses from their mean."""
        return self.numbers[..., 3]


def empty_window() -> Window:
    """Returns a window without losses."""
    return Window(jnp.zeros(4, _numerics.default_float_dtype()))


def observe(window: Window, loss: jax.Array) -> Window:
    """Adds a loss, by Welford's update of the mean and the squared deviations."""
    finite = jnp.isfinite(loss)
    count = window.finite + finite.astype(loss.dtype)
    deviation = _numerics.where(finite, loss - window.mean, 0)
    mean = window.mean + deviation / jnp.maximum(count, 1)
    squares = window.squares + deviation * _numerics.where(finite, loss - mean, 0)
    return Window(jnp.stack([window.steps + 1, count, mean, squares]))


def variance(window: Window) -> jax.Array:
    """Variance of single losses; 0 if fewer than two are finite."""
    return window.squares / jnp.maximum(window.finite - 1, 1)


def mean_variance(window: Window) -> jax.Array:
    """Squared standard error of the mean; 0 if fewer than two losses are finite."""
    return variance(window) / jnp.maximum(window.finite, 1)


def rise_limit(mean: jax.Array, variance: jax.Array) -> jax.Array:
    """The threshold that the mean of :data:`NEAR` losses exceeds if the rise is significant."""
    return mean + _ERRORS * jnp.sqrt(variance / NEAR)
