"""Physics-informed networks: a differential equation solved by its residual at sampled points.

Source: M. Raissi, P. Perdikaris and G. E. Karniadakis, "Physics-informed neural networks", 2019. Boundary
values are met by construction, so the loss is the residual alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tasks.base import Batch, Params, Task
from experiments.tasks.networks import init_mlp, mlp

_HIDDEN = 32
_POINTS, _TEST_POINTS = 16384, 512

# From a point, shape (dimensions,), to the solution there.
Field = Callable[[jax.Array], jax.Array]


class Equation(NamedTuple):
    """A differential equation on a box.

    Attributes:
      low, high: corners of the box.
      solution: from points, shape (n, dimensions), to the values, shape (n,), in NumPy.
      ansatz: from a network's output and a point to a value that fulfils the boundary conditions.
      residual: of a field at a point.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    solution: Callable[[np.ndarray], np.ndarray]
    ansatz: Callable[[jax.Array, jax.Array], jax.Array]
    residual: Callable[[Field, jax.Array], jax.Array]


def poisson(frequency: float) -> Equation:
    """The equation u'' = f on [0, 1] with u = 0 at both ends; u = sin(2 pi x) + 0.1 sin(2 pi frequency x)."""
    low, high = 2 * np.pi, 2 * np.pi * frequency

    def residual(field: Field, point: jax.Array) -> jax.Array:
        derivative = lambda x: jax.jvp(field, (x,), (jnp.ones(1),))[1]  # noqa: E731
        second = jax.jvp(derivative, (point,), (jnp.ones(1),))[1]
        x = point[0]
        force = -(low**2) * jnp.sin(low * x) - 0.1 * high**2 * jnp.sin(high * x)
        return (second - force) / low**2

    return Equation(
        (0.0,),
        (1.0,),
        solution=lambda x: np.sin(low * x[:, 0]) + 0.1 * np.sin(high * x[:, 0]),
        ansatz=lambda output, point: output * point[0] * (1 - point[0]),
        residual=residual,
    )


def burgers(viscosity: float) -> Equation:
    """The equation u_t + u u_x = viscosity u_xx for t in [0, 1] and x in [-1, 1].

    Initial and boundary values: u(0, x) = -sin(pi x), u(t, -1) = u(t, 1) = 0.
    """

    def solution(points: np.ndarray) -> np.ndarray:
        # Cole and Hopf's transformation, its integrals by Gauss-Hermite quadrature.
        nodes, weights = np.polynomial.hermite.hermgauss(64)
        t, x = points[:, :1].astype(float), points[:, 1:].astype(float)
        at = x - nodes * np.sqrt(4 * viscosity * t)
        weights = weights * np.exp(-np.cos(np.pi * at) / (2 * np.pi * viscosity))
        return -(weights * np.sin(np.pi * at)).sum(axis=1) / weights.sum(axis=1)

    def residual(field: Field, point: jax.Array) -> jax.Array:
        along_t, along_x = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
        value, u_t = jax.jvp(field, (point,), (along_t,))
        derivative = lambda p: jax.jvp(field, (p,), (along_x,))[1]  # noqa: E731
        u_x, u_xx = jax.jvp(derivative, (point,), (along_x,))
        return u_t + value * u_x - viscosity * u_xx

    def ansatz(output: jax.Array, point: jax.Array) -> jax.Array:
        t, x = point
        return -jnp.sin(jnp.pi * x) + t * (1 - x**2) * output

    return Equation((0.0, -1.0), (1.0, 1.0), solution, ansatz, residual)


def make(name: str, equation: Equation) -> Task:
    """Three hidden layers of 32 tanh units; the metric is the relative L2 error of the solution."""
    dimensions = len(equation.low)

    def points(seed: int, count: int) -> Batch:
        rng = np.random.default_rng(seed)
        at = rng.uniform(equation.low, equation.high, (count, dimensions)).astype(np.float32)
        return {"point": at, "solution": equation.solution(at).astype(np.float32)}

    def field(params: Params, point: jax.Array) -> jax.Array:
        return equation.ansatz(mlp(params, point, jnp.tanh)[0], point)

    def loss(params: Params, batch: Batch) -> jax.Array:
        residual = lambda point: equation.residual(lambda at: field(params, at), point)  # noqa: E731
        return jnp.mean(jax.vmap(residual)(batch["point"]) ** 2)

    def error(params: Params, batch: Batch) -> jax.Array:
        difference = jax.vmap(lambda point: field(params, point))(batch["point"]) - batch["solution"]
        return jnp.sqrt(jnp.mean(difference**2) / jnp.mean(batch["solution"] ** 2))

    return Task(
        name,
        init=lambda key: init_mlp(key, (dimensions, _HIDDEN, _HIDDEN, _HIDDEN, 1)),
        loss=loss,
        metric=error,
        metric_name="relative error",
        train=points(0, _POINTS),
        test=points(1, _TEST_POINTS),
        batch_size=128,
        measure="loss",
    )


def make_poisson(name: str, frequency: float) -> Task:
    """Poisson's equation, see :func:`poisson`."""
    return make(name, poisson(frequency))


def make_burgers(name: str, viscosity: float) -> Task:
    """Burgers' equation, see :func:`burgers`."""
    return make(name, burgers(viscosity))
