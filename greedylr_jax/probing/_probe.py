"""The loss along one direction in parameter space: values at several points, and derivatives.

Along a direction d the loss is a function of the distance t: f(t) = value_fn(params + t d), with its values
at several t (:func:`losses_along`), a parabola fitted to them (:func:`fit_parabola`), and its second-order
Taylor polynomial (:func:`taylor_along`). These functions make no assumption about the sign of d.
:func:`rate_by_fit` and :func:`rate_by_taylor` do: their ``direction`` points uphill, as the gradient does,
and the step is ``-learning_rate * direction``.
"""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks, _numerics, _observe

ValueFn = Callable[[optax.Params], jax.Array]


class Parabola(NamedTuple):
    """k0 + k1 t + k2 t^2."""

    k0: jax.Array  # shape=(), dtype=float
    k1: jax.Array  # shape=(), dtype=float
    k2: jax.Array  # shape=(), dtype=float


def superbatch_loss(loss_fn: Callable[[optax.Params, Any], jax.Array], batches: Any) -> ValueFn:
    """The mean loss over a stack of batches, as a function of the parameters.

    The loss of one batch is too noisy to choose a learning rate by. Batches are evaluated sequentially, so
    that peak memory is that of one batch.

    Args:
      loss_fn: from parameters and one batch to its scalar loss.
      batches: a pytree of arrays whose leading axis is the batch; its length, >= 1, is the same for all
        leaves.

    Returns:
      A function from the parameters to a scalar, float32 or wider, as ``tx.update(..., value_fn=)`` takes.

    Raises:
      ValueError: if ``batches`` has no array, or the leading axes differ.

    Examples:
      >>> import jax.numpy as jnp
      >>> from greedylr_jax import superbatch_loss
      >>> value_fn = superbatch_loss(lambda w, x: jnp.mean((x @ w) ** 2), jnp.ones((5, 8, 3)))
      >>> print(value_fn(jnp.ones(3)))  # five batches of eight examples
      9.0

    Source: LRTuner, Section 2, "Stochasticity", and Appendix C.
    """
    _checks.check_leading_axis("batches", batches, "batches")

    def value_fn(params: optax.Params) -> jax.Array:
        def one_batch(batch: Any) -> jax.Array:
            return jnp.asarray(loss_fn(params, batch), _numerics.default_float_dtype())

        return jnp.mean(jax.lax.map(one_batch, batches))

    return value_fn


def losses_along(
    value_fn: ValueFn,
    params: optax.Params,
    direction: optax.Updates,
    distances: jax.Array,
    *,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """The loss at ``params + t * direction`` for each t, evaluated sequentially.

    Args:
      value_fn: from parameters to a scalar loss.
      params: the parameters at t = 0.
      direction: a pytree like the parameters.
      distances: t, shape (n,).
      axis_name: the mapped axis, or axes, over which the losses are averaged.

    Returns:
      Shape (n,), float32 or wider.
    """
    losses = jax.lax.map(lambda t: _loss(value_fn, move(params, direction, t)), distances)
    return _observe.average(losses, axis_name)


def taylor_along(
    value_fn: ValueFn,
    params: optax.Params,
    direction: optax.Updates,
    distance: jax.Array,
    *,
    axis_name: Hashable | None = None,
) -> Parabola:
    """The second-order Taylor polynomial of the loss around ``params + distance * direction``.

    Exact, from one forward pass with first and second derivatives (forward over forward). Its argument is
    t - ``distance``.
    """

    def loss(t: jax.Array) -> jax.Array:
        return _loss(value_fn, move(params, direction, t))

    def loss_and_slope(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(loss, (t,), (jnp.ones_like(t),))

    (k0, k1), (_, curvature) = jax.jvp(loss_and_slope, (distance,), (jnp.ones_like(distance),))
    return _observe.average(Parabola(k0, k1, curvature / 2), axis_name)


def fit_parabola(losses: jax.Array, width: jax.Array) -> Parabola:
    """Least-squares parabola through losses at equally spaced distances from -width to width.

    Args:
      losses: shape (n,), n >= 3.
      width: > 0.
    """
    nodes = np.linspace(-1.0, 1.0, losses.shape[0])
    weights = np.linalg.pinv(np.stack([nodes**0, nodes, nodes**2], axis=1))
    # The sums below cancel, so the common part of the losses is subtracted first.
    common = losses[losses.shape[0] // 2]
    k0, k1, k2 = (jnp.sum(jnp.asarray(row, losses.dtype) * (losses - common)) for row in weights)
    return Parabola(common + k0, k1 / width, k2 / width / width)


def rate_by_fit(
    value_fn: ValueFn,
    params: optax.Params,
    direction: optax.Updates,
    learning_rate: jax.Array,
    bound: jax.Array,
    width: jax.Array,
    num_samples: int,
    *,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """:func:`best_rate` for the step ``-learning_rate * direction``, by a parabola through sampled losses.

    The ``num_samples`` learning rates lie between ``learning_rate - width`` and ``learning_rate + width``.
    ``direction`` points uphill, as the gradient does.
    """
    offsets = width * jnp.linspace(-1.0, 1.0, num_samples, dtype=width.dtype)
    distances = -(learning_rate + offsets)
    losses = losses_along(value_fn, params, direction, distances, axis_name=axis_name)
    return best_rate(fit_parabola(losses, width), learning_rate, bound)


def rate_by_taylor(
    value_fn: ValueFn,
    params: optax.Params,
    direction: optax.Updates,
    learning_rate: jax.Array,
    bound: jax.Array,
    *,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """:func:`best_rate` for the step ``-learning_rate * direction``, by exact derivatives.

    ``direction`` points uphill, as the gradient does.
    """
    polynomial = taylor_along(value_fn, params, direction, -learning_rate, axis_name=axis_name)
    # The distance along the direction is minus the learning rate.
    return best_rate(polynomial._replace(k1=-polynomial.k1), learning_rate, bound)


def best_rate(parabola: Parabola, learning_rate: jax.Array, bound: jax.Array) -> jax.Array:
    """The learning rate at the minimum of a parabola in the change of the learning rate.

    Args:
      parabola: loss as a function of the change.
      learning_rate: > 0.
      bound: maximum change, >= 0.

    Returns:
      A scalar; NaN if the parabola is not finite. If it is not convex, the learning rate changes by ``bound``
      in the direction in which the loss decreases, but to no less than half.
    """
    convex = parabola.k2 > 0
    vertex = -parabola.k1 / (2 * jnp.where(convex, parabola.k2, 1))
    downhill = jnp.maximum(-jnp.sign(parabola.k1) * bound, -learning_rate / 2)
    eps = jnp.where(convex, jnp.clip(vertex, -bound, bound), downhill)
    known = jnp.isfinite(parabola.k1) & jnp.isfinite(parabola.k2)
    return jnp.where(known, learning_rate + eps, jnp.nan)


def move(params: optax.Params, direction: optax.Updates, distance: ArrayLike) -> optax.Params:
    """``params + distance * direction``, in the parameters' dtypes; those without a direction as they are."""
    steps = _numerics.scale_updates(direction, jnp.asarray(distance, _numerics.default_float_dtype()))
    return jax.tree.map(
        lambda step, part: part if step is None else optax.apply_updates(part, step),
        steps,
        params,
        is_leaf=lambda step: step is None,
    )


def _loss(value_fn: ValueFn, params: optax.Params) -> jax.Array:
    return jnp.asarray(value_fn(params), _numerics.default_float_dtype())


def check_value_fn(rule_name: str, value_fn: ValueFn | None, params: Any) -> ValueFn:
    """Returns ``value_fn``, or raises an error that shows the right call if it or ``params`` is missing."""
    right_call = "tx.update(grads, opt_state, params, value=loss, value_fn=lambda p: loss_fn(p, batch))"
    if value_fn is None or not callable(value_fn):
        raise TypeError(
            f"{rule_name} evaluates the loss along the step, so it needs the loss as a function of the "
            f"parameters: call {right_call}, got value_fn={value_fn!r}."
        )
    if params is None:
        raise TypeError(f"{rule_name} needs the parameters: call {right_call}.")
    return value_fn
