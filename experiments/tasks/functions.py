"""Test functions with a known minimum of 0, without data; the initial point is random.

Source: H. H. Rosenbrock, "An automatic method for finding the greatest or least value of a function", 1960;
L. A. Rastrigin, "Systems of extremal control", 1974; D. H. Ackley, "A connectionist machine for genetic
hillclimbing", 1987; collected by S. Surjanovic and D. Bingham, Virtual Library of Simulation Experiments.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.base import Batch, Params, Task

SOLVED = 1e-2  # a function counts as minimized below this value


class Function(NamedTuple):
    """A function of a point, and the distribution of the initial point."""

    value: Callable[[jax.Array], jax.Array]
    dimensions: int
    extent: float  # initial coordinates are uniform in [-extent, extent]


def _quadratic(condition: float, dimensions: int = 20) -> Function:
    curvatures = np.geomspace(1 / condition, 1.0, dimensions).astype(np.float32)
    return Function(lambda x: 0.5 * jnp.sum(curvatures * x**2), dimensions, 1.0)


def _rosenbrock(x: jax.Array) -> jax.Array:
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def _rastrigin(x: jax.Array) -> jax.Array:
    return jnp.sum(x**2 - 10 * jnp.cos(2 * jnp.pi * x) + 10)


def _ackley(x: jax.Array) -> jax.Array:
    # The root is not differentiable at 0; the constant shifts the minimum by a negligible amount.
    distance = jnp.sqrt(jnp.mean(x**2) + 1e-12)
    return -20 * jnp.exp(-0.2 * distance) - jnp.exp(jnp.mean(jnp.cos(2 * jnp.pi * x))) + 20 + jnp.e


FUNCTIONS = {
    "quadratic-10": _quadratic(10.0),
    "quadratic-1000": _quadratic(1000.0),
    "rosenbrock": Function(_rosenbrock, 4, 1.0),
    "rastrigin": Function(_rastrigin, 4, 1.0),
    "ackley": Function(_ackley, 4, 2.0),
}
_RATES = {
    "adamw": (1e-3, 1e-2, 1e-1),
    "sgd": (1e-4, 1e-3, 1e-2),
    "adagrad": (1e-2, 1e-1, 1.0),
    "adafactor": (1e-3, 1e-2, 1e-1),
}


def make(name: str) -> Task:
    """Minimization of one of :data:`FUNCTIONS`; the metric is 1 below :data:`SOLVED`, and 0 otherwise."""
    function = FUNCTIONS[name]

    def loss(params: Params, batch: Batch) -> jax.Array:
        del batch
        return function.value(params["x"])

    no_data = {"input": np.zeros((1, 1), np.float32)}
    return Task(
        name,
        init=lambda key: {
            "x": jax.random.uniform(key, (function.dimensions,), minval=-1, maxval=1) * function.extent
        },
        loss=loss,
        metric=lambda params, batch: (loss(params, batch) < SOLVED).astype(jnp.float32),
        metric_name="solved",
        train=no_data,
        test=no_data,
        batch_size=1,
        learning_rates=_RATES | ({"sgd": (1e-2, 1e-1, 1.0)} if name.startswith("quadratic") else {}),
    )
