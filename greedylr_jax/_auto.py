"""An optimizer without a learning rate: updates measured against the initial parameters.

    rms(update of step t) = 0.03 * s(t) * rms(initial parameters)

with s(t) a linear warm-up over the first 30% of the steps times a cosine from 1 to 0; three times as much
for an optimizer without momentum. The constants, and the adaptive rules that were tried behind them and
rejected, are in docs/auto.md.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from greedylr_jax import _checks, _forwarding, _inner, _numerics, _relative

# Chosen on the development tasks, see the tables in docs/auto.md.
_RELATIVE_STEP = 0.03  # rms(update) / rms(initial parameters) at s = 1; "Relative step and warm-up"
_WARM_UP = 0.3  # share of the steps; "Relative step and warm-up"
_FREE_RELATIVE_STEP = 0.02  # without total_steps; "Unknown number of steps"
# Momentum of 0.9 averages the noise of ten gradients, which divides its norm by the square root of ten; an
# update of the same norm without momentum makes a third of the progress. "Optimizers without momentum"
_WITHOUT_MOMENTUM = 3.0  # factor on both
_DECAY_STEPS = 200.0  # without total_steps: steps after which s has fallen to 1/2; the same table
_MIN_STEPS = 10  # of a training: 3 steps of warm-up


class AutoState(NamedTuple):
    """State of :func:`auto_lr`."""

    coefficient: jax.Array  # shape=(), dtype=float; relative step at s = 1
    relative: _relative.ScaleToParametersState  # learning rate, step, size of the initial parameters
    inner_state: optax.OptState


def auto_lr(
    inner: optax.GradientTransformation,
    *,
    total_steps: ArrayLike | None = None,
    shard_axis_name: Hashable | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that needs no learning rate.

    Scales the updates of ``inner`` to a root mean square relative to that of the initial parameters, see
    :func:`greedylr_jax.scale_to_parameters`: 0.03 times a linear warm-up from 0 to 1 over the first 30% of
    the steps times a cosine from 1 to 0 over all of them; the maximum is 0.024. Without
    ``total_steps`` it is 0.02 / (1 + t / 200) at step t. Both are three times as large if ``inner`` has no
    momentum (SGD, AdaGrad, RMSProp), as a short computation in ``init`` finds out. The units of the loss, of
    the gradients and of the parameters have no influence, unless they have one on the direction of the
    updates of ``inner`` (through the ``eps`` of Adam, for example).

    Args:
      inner: an optimizer built with learning rate 1, such as ``optax.adamw(1.0)``. Keep everything that
        changes updates (clipping, weight decay) inside it.
      total_steps: number of calls of ``update`` in the training, an integer >= 10; may be traced. Updates
        after it are zero. None: not known.
      shard_axis_name: mapped axis, or axes, over which the parameters are sharded, as in
        :func:`greedylr_jax.scale_to_parameters`.

    Returns:
      A ``GradientTransformationExtraArgs``; extra arguments such as ``value`` are passed to ``inner``. Its
      state has no copy of the parameters. :func:`greedylr_jax.get_learning_rate` reads the learning rate with
      which ``inner`` would have made the last update.

    Raises:
      ValueError: if ``total_steps`` is out of range, or at ``init`` if the updates of ``inner`` point uphill.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, greedylr_jax
      >>> loss_fn = lambda params: jnp.sum((params - 1) ** 2)
      >>> tx = greedylr_jax.auto_lr(optax.adamw(1.0), total_steps=1000)
      >>> def step(carry, _):
      ...     params, state = carry
      ...     loss, grads = jax.value_and_grad(loss_fn)(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     return (optax.apply_updates(params, updates), state), loss
      >>> params = jnp.full(3, 0.5)
      >>> (params, state), losses = jax.lax.scan(step, (params, tx.init(params)), length=1000)
      >>> bool(losses[-1] < 1e-4)
      True

    Source: this project.
    """
    if total_steps is not None:
        total_steps = _checks.check_integer("total_steps", total_steps, low=_MIN_STEPS)
    inner = _forwarding.accept_extra_args(inner)

    def relative(coefficient: jax.Array) -> Any:
        return _relative.scale_to_parameters(
            lambda step: coefficient * _schedule(step, total_steps), shard_axis_name=shard_axis_name
        )

    def init_fn(params: optax.Params) -> AutoState:
        _inner.check_descends("auto_lr", inner, params)
        largest = _FREE_RELATIVE_STEP if total_steps is None else _RELATIVE_STEP
        factor = 1.0 if _inner.has_momentum(inner, params) else _WITHOUT_MOMENTUM
        coefficient = jnp.asarray(factor * largest, _numerics.default_float_dtype())
        return AutoState(coefficient, relative(coefficient).init(params), inner.init(params))

    def update_fn(
        updates: optax.Updates, state: AutoState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AutoState]:
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        updates, relative_state = relative(state.coefficient).update(updates, state.relative)
        return updates, AutoState(state.coefficient, relative_state, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, cast(Any, update_fn))


def _schedule(step: ArrayLike, total_steps: ArrayLike | None) -> jax.Array:
    """Warm-up and annealing, between 0 and 1, after ``step`` updates."""
    dtype = _numerics.default_float_dtype()
    step = jnp.asarray(step, dtype)
    if total_steps is None:
        return 1 / (1 + step / _DECAY_STEPS)
    total = jnp.asarray(total_steps, dtype)
    warm_up = jnp.minimum((step + 1) / (_WARM_UP * total), 1)
    return warm_up * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / total, 1)))
