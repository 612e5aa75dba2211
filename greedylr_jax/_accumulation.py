"""Gradient accumulation that accumulates the loss beside the gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from greedylr_jax import _numerics, _observe, _rule


class MultiStepsState(NamedTuple):
    """State of :func:`multi_steps`."""

    accumulation: optax.MultiStepsState
    value_sum: jax.Array  # shape=(), dtype=float; sum of the losses of this optimizer step so far
    value_count: jax.Array  # shape=(), dtype=int32; how many they are


def multi_steps(
    tx: optax.GradientTransformation, every_k_schedule: int | Callable[[jax.Array], jax.Array]
) -> _rule.GradientTransformationExtraLoss:
    """``optax.MultiSteps`` for rules: each optimizer step sees the mean loss of its micro-batches.

    Plain ``optax.MultiSteps`` works with every rule too, but hands on the loss of the last micro-batch
    alone, which is noisier than need be.

    Args:
      tx: the transformation, with a rule in it.
      every_k_schedule: how many micro-batches make one optimizer step: an integer >= 1, or a function
        from the number of optimizer steps to it, as in ``optax.MultiSteps``.

    Returns:
      A :class:`greedylr_jax.GradientTransformationExtraLoss` whose updates are zero but for every k-th.

    Raises:
      ValueError: as ``optax.MultiSteps``. Its ``update`` raises ``TypeError`` or ``ValueError`` if ``value``
        is missing or not a real scalar.

    Examples:
      >>> import jax.numpy as jnp, optax, greedylr_jax
      >>> rule = greedylr_jax.greedy_lr(patience=0, window=None)
      >>> tx = greedylr_jax.multi_steps(optax.chain(optax.sgd(1.0), rule), 2)
      >>> params = jnp.ones(2)
      >>> state = tx.init(params)
      >>> for loss in (1.0, 3.0):
      ...     updates, state = tx.update(jnp.ones(2), state, params, value=loss)
      >>> print(greedylr_jax.metrics(state)["best_value"])
      2.0
    """
    steps = optax.MultiSteps(tx, every_k_schedule)

    def init_fn(params: optax.Params) -> MultiStepsState:
        return MultiStepsState(
            accumulation=steps.init(params),
            value_sum=jnp.zeros((), _numerics.default_float_dtype()),
            value_count=jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates: optax.Updates,
        state: MultiStepsState,
        params: optax.Params | None = None,
        *,
        value: ArrayLike | None = None,
        has_value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MultiStepsState]:
        value_sum, value_count = state.value_sum, state.value_count
        observed = jnp.asarray(True if has_value is None else has_value, bool)
        if value is not None or has_value is None:
            loss = _observe.check_loss("multi_steps", value).astype(value_sum.dtype)
            value_sum = jnp.where(observed, value_sum + loss, value_sum)
            value_count = value_count + observed.astype(jnp.int32)
        # Optax calls the inner transformation at every micro-step and keeps what the last one gives, for
        # which the running mean is the mean of all.
        mean = value_sum / jnp.maximum(value_count, 1).astype(value_sum.dtype)
        updates, accumulation = steps.update(
            updates, state.accumulation, params, value=mean, has_value=value_count > 0, **extra_args
        )
        stepped = accumulation.gradient_step != state.accumulation.gradient_step
        return updates, MultiStepsState(
            accumulation=accumulation,
            value_sum=jnp.where(stepped, 0, value_sum),
            value_count=jnp.where(stepped, 0, value_count),
        )

    return _rule.GradientTransformationExtraLoss(init_fn, update_fn)
