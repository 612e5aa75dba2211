"""Running mean and variance of the losses of a window."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from greedylr_jax import _numerics

LONGEST = 2**24  # maximum number of losses in a window: float32 counts exactly up to it
NEAR = 3  # number of recent losses whose mean is compared with a threshold
_ERRORS = 6.0  # standard errors between the mean and the threshold
_OUTLIER = 10.0  # standard deviations above the mean to which a loss is clipped
# Relative rounding error of a loss: four units in the last place of float32, in which most networks compute
# their loss even under x64.
_ROUNDING = 4 * float(np.finfo(np.float32).eps)


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
    return Window(_packed(window.steps + 1, count, mean, squares))


def _packed(*numbers: jax.Array) -> jax.Array:
    """An array of scalars.

    By selects, which XLA compiles for a GPU into the same kernel as the computation of the scalars;
    ``jnp.stack`` is a kernel of its own.
    """
    place = np.arange(len(numbers))
    packed = jnp.broadcast_to(numbers[-1], place.shape)
    for index, number in enumerate(numbers[:-1]):
        packed = _numerics.where(place == index, jnp.broadcast_to(number, place.shape), packed)
    return packed


def variance(window: Window) -> jax.Array:
    """Variance of single losses; 0 if fewer than two are finite."""
    return window.squares / jnp.maximum(window.finite - 1, 1)


def mean_variance(window: Window) -> jax.Array:
    """Squared standard error of the mean, at least that of rounding."""
    return jnp.maximum(variance(window) / jnp.maximum(window.finite, 1), _rounding_variance(window.mean))


def clip_outlier(window: Window, loss: jax.Array) -> jax.Array:
    """Clips a finite loss to at most ten standard deviations above the mean of a window.

    A window of fewer than two finite losses clips nothing.
    """
    deviation = jnp.sqrt(jnp.maximum(variance(window), _rounding_variance(window.mean)))
    clipped = jnp.minimum(loss, window.mean + _OUTLIER * deviation)
    return _numerics.where((window.finite > 1) & jnp.isfinite(loss), clipped, loss)


def rise_threshold(mean: jax.Array, variance: jax.Array) -> jax.Array:
    """The threshold that the mean of :data:`NEAR` losses exceeds if the rise is significant."""
    return mean + _ERRORS * jnp.sqrt(jnp.maximum(variance / NEAR, _rounding_variance(mean)))


def _rounding_variance(mean: jax.Array) -> jax.Array:
    return (_ROUNDING * mean) ** 2
