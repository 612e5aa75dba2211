"""An optimizer without a learning rate: updates measured against the initial parameters.

    rms(update of step t) = 0.002 * scale(losses) * s(t) * rms(initial parameters)

The scale starts at 1 and follows the trend rule (:func:`greedylr_jax.trend_lr`): it rises, up to 10, while
the training loss falls significantly, and is cut when the loss rises. s(t) is a warm-up and an annealing.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks, _inner, _numerics, _observe, _relative, _rule, _trend

# Dimensionless but for the steps; the tables that chose them are in docs/auto.md.
_RELATIVE_STEP = 0.002  # rms(update) / rms(initial parameters) at scale 1
_MAX_SCALE, _MIN_SCALE = 10.0, 0.1  # of the trend rule
_WARM_UP = 0.02  # share of the steps
_MIN_STEPS = 10  # of a training
_SAMPLE_SIZE = 2**14  # elements of a leaf that its size is estimated from: an error of 1% at most
_DECAY_STEPS = 50.0  # without total_steps: steps after which s has fallen to 1 / sqrt(2)


class AutoState(NamedTuple):
    """State of :func:`auto_lr`."""

    relative: _relative.ScaleToParametersState  # the current learning rate, the step, the parameters' size
    trend: _trend.TrendState
    inner_state: optax.OptState


def auto_lr(
    inner: optax.GradientTransformation,
    *,
    total_steps: ArrayLike | None = None,
    axis_name: Hashable | None = None,
    shard_axis_name: Hashable | None = None,
) -> _rule.GradientTransformationExtraLoss:
    """An optimizer that needs no learning rate.

    Scales the updates of ``inner`` to a root mean square of 0.002 times that of the initial parameters, see
    :func:`greedylr_jax.scale_to_parameters`. This multiple rises to 0.02 while the training loss falls
    significantly, is cut when the loss rises, and is annealed: a linear warm-up over 2% of the steps and a
    cosine to zero, or without ``total_steps`` an inverse square root. No decision depends on the units of the
    loss, of the gradients or of the parameters, if ``inner`` does not (the ``eps`` of Adam does).

    Args:
      inner: an optimizer built with learning rate 1, such as ``optax.adamw(1.0)``. Keep everything that
        changes updates (clipping, weight decay) inside it.
      total_steps: number of calls of ``update`` in the training, an integer >= 10; may be traced. Updates
        after it are zero. None: not known.
      axis_name: mapped axis, or axes, over which the loss is averaged.
      shard_axis_name: mapped axis, or axes, over which the parameters are sharded, as in
        :func:`greedylr_jax.scale_to_parameters`.

    Returns:
      A :class:`greedylr_jax.GradientTransformationExtraLoss`: call
      ``update(grads, state, params, value=loss)``. Steps with ``has_value=False`` count for the annealing.
      Its state has no copy of the parameters. A loss that is not finite cuts the scale; updates that are not
      finite become zero. :func:`greedylr_jax.get_learning_rate` reads the rate at which ``inner`` would have
      made the last update.

    Raises:
      ValueError: if ``total_steps`` is out of range, or at ``init`` if the updates of ``inner`` point uphill.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, greedylr_jax
      >>> loss_fn = lambda params: jnp.sum((params - 1) ** 2)
      >>> tx = greedylr_jax.auto_lr(optax.adamw(1.0), total_steps=1000)
      >>> def step(carry, _):
      ...     params, state = carry
      ...     loss, grads = jax.value_and_grad(loss_fn)(params)
      ...     updates, state = tx.update(grads, state, params, value=loss)
      ...     return (optax.apply_updates(params, updates), state), loss
      >>> params = jnp.full(3, 0.5)
      >>> (params, state), losses = jax.lax.scan(step, (params, tx.init(params)), length=1000)
      >>> bool(losses[-1] < 1e-4)
      True

    Source: this project.
    """
    if total_steps is not None:
        total_steps = _checks.check_integer("total_steps", total_steps, low=_MIN_STEPS)
    inner = optax.with_extra_args_support(inner)
    rule = _trend.trend_rule(_trend.TrendSettings(min_scale=_MIN_SCALE, max_scale=_MAX_SCALE))

    def relative(scale: jax.Array) -> Any:
        return _relative.scale_to_parameters(
            lambda step: _RELATIVE_STEP * scale * _annealing(step, total_steps),
            shard_axis_name=shard_axis_name,
        )

    def init_fn(params: optax.Params) -> AutoState:
        _inner.check_descends("auto_lr", inner, params)
        scale = jnp.ones((), _numerics.default_float_dtype())
        return AutoState(relative(scale).init(params), rule.init(scale), inner.init(params))

    def update_fn(
        updates: optax.Updates,
        state: AutoState,
        params: optax.Params | None = None,
        *,
        value: ArrayLike | None = None,
        has_value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AutoState]:
        observation = _observe.read("auto_lr", value, has_value, state.trend.scale.dtype, axis_name)
        trend = state.trend
        if not observation.is_absent:
            trend = _numerics.select(observation.has_value, rule.update(trend, observation.value), trend)
        extra_args |= _observe.given(value=value, has_value=has_value)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        updates, relative_state = relative(trend.scale).update(updates, state.relative)
        return updates, AutoState(relative_state, trend, inner_state)

    return _rule.GradientTransformationExtraLoss(init_fn, update_fn)


def _annealing(step: ArrayLike, total_steps: ArrayLike | None) -> jax.Array:
    """s(t): the factor of the relative step after ``step`` updates, between 0 and 1."""
    dtype = _numerics.default_float_dtype()
    step = jnp.asarray(step, dtype)
    if total_steps is None:
        return jax.lax.rsqrt(1 + step / _DECAY_STEPS)
    total = jnp.asarray(total_steps, dtype)
    warm_up = jnp.minimum((step + 1) / jnp.maximum(_WARM_UP * total, 1), 1)
    return warm_up * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / total, 1)))
